"""Whether a model and a run fit the layout that is asked for."""

from __future__ import annotations

from transformers import PreTrainedConfig

from crossdock.config.requirements import require
from crossdock.config.settings import Config
from crossdock.models import FAMILIES
from crossdock.models.generic import Generic
from crossdock.parallel import ParallelDims

__all__ = ["check_tensor_parallel"]

_TP = "parallelism.tensor_parallel_degree"


def check_tensor_parallel(config: Config, dims: ParallelDims, model: PreTrainedConfig) -> None:
    """What `tp` divides: heads, the vocabulary, dense layers, sequences.

    Raises:
        ConfigError: with the rule that is broken and the nearest degree that fits.
    """
    if dims.tp == 1:
        return
    family, text = FAMILIES[config.model.name], model.get_text_config()
    one = "must be 1 "
    require(config, _TP, not isinstance(family, Generic), f"{one}with model.name = generic, which has no plan for it")
    require(config, _TP, not config.lora.rank, f"{one}with lora.rank: adapters are not split")
    require(config, _TP, config.model.kernels == "none", f"{one}with model.kernels = {config.model.kernels}")
    plan = family.tensor_plan(model)
    sizes = {"the vocabulary": text.vocab_size, "training.seq_len": config.training.seq_len // dims.cp}
    if any(region.columns for name, region in plan.regions.items() if name == "self_attn"):
        sizes["the attention heads"] = plan.num_heads
    for name in ("intermediate_size", "intermediate_size_mlp", "shared_expert_intermediate_size"):
        if getattr(text, name, None):
            sizes[name] = getattr(text, name)

    def fits(degree: int) -> bool:
        heads = plan.num_key_value_heads
        return all(size % degree == 0 for size in sizes.values()) and (heads % degree == 0 or degree % heads == 0)

    working = [degree for degree in range(1, dims.tp * 2 + 1) if fits(degree)]
    nearest = min(working, key=lambda degree: abs(degree - dims.tp))
    what = ", ".join(f"{name} ({size})" for name, size in sizes.items())
    valid = f"must divide {what}, and divide the {plan.num_key_value_heads} key-value heads or be a multiple of them"
    require(config, _TP, fits(dims.tp), f"{valid}; the nearest that does is {nearest}")
