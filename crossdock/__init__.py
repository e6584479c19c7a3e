"""crossdock: expert parallelism for PyTorch."""

from importlib.metadata import version

from crossdock.integrations.options import configure
from crossdock.moe import MoE, finish_step, moe_layers, set_batch_totals
from crossdock.moe_config import MoEConfig
from crossdock.parallel import (
    ExpertParallel,
    ParallelDims,
    apply_ep,
    apply_fsdp,
    clip_grad_norm_,
    parallelize,
)
from crossdock.routing import RouterConfig

__version__ = version("crossdock")

__all__ = [
    "ExpertParallel",
    "MoE",
    "MoEConfig",
    "ParallelDims",
    "RouterConfig",
    "__version__",
    "apply_ep",
    "apply_fsdp",
    "clip_grad_norm_",
    "configure",
    "finish_step",
    "moe_layers",
    "parallelize",
    "set_batch_totals",
]
