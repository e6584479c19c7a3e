"""Any family of transformers whose experts ours can compute: it keeps its router, and all else, but the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from crossdock.checkpoint import HFKeys
from crossdock.experts import GroupedExperts
from crossdock.models.family import Block, ExpertSizes, Family, Kernels, ModelError
from crossdock.models.hf_experts import UnknownExperts, experts_formula, experts_params, is_experts
from crossdock.models.hf_keys import converted_keys
from crossdock.models.padding import keep_padding_mask
from crossdock.moe import moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.routed_experts import RoutedExperts

__all__ = ["Generic", "replace_experts"]

# What configurations call the number of experts per token.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_experts_per_token", "moe_router_topk")


def replace_experts(model: nn.Module, config: Any, moe: MoEConfig | None = None) -> nn.Module:
    """Replace, in place and values kept, transformers' experts modules by `RoutedExperts`.

    What surrounds them, the router included, stays and calls them as before. `apply_ep`, `apply_fsdp` and so on do the
    rest, as for layers of ours.

    Args:
        model: or a part of one, of transformers.
        config: of the text model, which knows the number of experts per token.
        moe: dispatcher and backends; nothing of a router or its losses.

    Returns:
        `model`, unchanged where it has none.

    Raises:
        MoEConfigError: for a setting that needs a router of ours.
        UnknownExperts: for experts that ours would compute wrongly.
    """
    moe = moe or MoEConfig()
    moe.check()
    moe.check_without_router()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if is_experts(child):
                setattr(module, name, _routed(child, _top_k(config), moe))
    return model


class Generic(Family):
    """`model.name = generic`: no adapter of one family; what its model is, config.json says."""

    name = "generic"
    model_type = ""
    block = ""
    hf_keys = HFKeys()

    def read_block(self, block: Any, config: Any) -> Block:
        raise TypeError("blocks stay transformers' own")

    def hf_config_from(self, folder: Path) -> PreTrainedConfig:
        return _text_config(super().hf_config_from(folder))

    def build(self, hf_config: PreTrainedConfig) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(
            hf_config, attn_implementation=hf_config._attn_implementation, dtype=torch.float32
        )

    def adapt(
        self, model: PreTrainedModel, moe: MoEConfig, *, kernels: Kernels = "none", force_load_balance: bool = False
    ) -> PreTrainedModel:
        """Replace the experts, in place and values kept; let the model take a `padding_mask`."""
        if kernels != "none":
            raise ModelError(
                "kernels", kernels, "none with model.name = generic, which keeps the family's norms and head"
            )
        if force_load_balance:
            raise ValueError("force_load_balance needs a router of ours, which model.name = generic has not")
        model.config.output_router_logits = False
        try:
            replace_experts(model, model.config.get_text_config(), moe)
        except UnknownExperts as error:
            raise ModelError(
                "name", self.name, f"{model.config.model_type} has {error}, which ours compute not"
            ) from None
        if not moe_layers(model):
            valid = f"{model.config.model_type} has no experts that transformers' registry of experts knows"
            raise ModelError("name", self.name, valid)
        keep_padding_mask(model)
        return model

    def expert_sizes(self, config: Any) -> ExpertSizes:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        downs = [experts_params(module).down_projs.shape for module in model.modules() if is_experts(module)]
        num_experts, intermediate_size, hidden_size = downs[0]
        return ExpertSizes(num_experts, hidden_size, intermediate_size)

    def keys(self, model: PreTrainedModel) -> HFKeys:
        with torch.device("meta"):
            return converted_keys(AutoModelForCausalLM.from_config(model.config))

    @torch.no_grad()
    def reset_buffers(self, model: nn.Module) -> None:
        # transformers' own way to give buffers their values leaves alone what is marked so.
        for parameter in model.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        _initialise(model, None)


def _initialise(module: nn.Module, of_model: Any) -> None:
    """Call `_init_weights` of the innermost surrounding model on each module."""
    if isinstance(module, RoutedExperts):
        return
    of_model = module if isinstance(module, PreTrainedModel) else of_model
    for child in module.children():
        _initialise(child, of_model)
    if of_model is not None:
        of_model._init_weights(module)


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration itself where transformers has a causal language model for it, or else its text part."""
    for each in (config, config.get_text_config()):
        if type(each) in AutoModelForCausalLM._model_mapping:
            return each
    raise ModelError(
        "name", Generic.name, f"needs a causal language model, which transformers has none of for {config.model_type}"
    )


def _top_k(config: Any) -> int:
    values = (getattr(config, name, None) for name in _TOP_K)
    top_k = next((value for value in values if isinstance(value, int)), None)
    if top_k is None:
        raise UnknownExperts(f"a number of experts per token that {type(config).__name__} calls none of {_TOP_K}")
    return top_k


@torch.no_grad()
def _routed(module: nn.Module, top_k: int, moe: MoEConfig) -> RoutedExperts:
    """The module as ours, of the same device and dtype."""
    formula, params = experts_formula(module), experts_params(module)
    num_experts, intermediate_size, hidden_size = params.down_projs.shape
    with params.down_projs.device:
        experts = GroupedExperts(
            num_experts, hidden_size, intermediate_size, moe.experts, formula, bias=params.down_bias is not None
        ).to(params.down_projs.dtype)
        experts.static_shapes = moe.static_shapes
        for name, tensor in params._asdict().items():
            if tensor is not None:
                getattr(experts, name).copy_(tensor)
        return RoutedExperts(experts, num_experts, hidden_size, top_k, moe)
