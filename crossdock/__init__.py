"""crossdock: expert parallelism for PyTorch.

Names are imported when they are first asked for: `crossdock --version` needs no torch, and Ctrl-C within the seconds
that importing torch takes is the command line's to answer.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "MoE": "moe",
    "MoEConfig": "moe_config",
    "RouterConfig": "routing",
    "configure": "integrations.options",
    "finish_step": "moe",
    "moe_layers": "moe",
    "set_batch_totals": "moe",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'parallel')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
