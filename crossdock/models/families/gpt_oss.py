"""gpt-oss: softmax over the chosen, biases everywhere, a clamped gate (openai/gpt-oss, model card)."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from crossdock.checkpoint import HFKeys
from crossdock.experts import GPT_OSS, QUICK_GELU_ALPHA, ExpertParams, halves_apart
from crossdock.models.context import mask_documents
from crossdock.models.family import GROUPED_QUERIES, Block, Family, Kernels
from crossdock.models.norm import NormFormula
from crossdock.moe_config import MoEConfig
from crossdock.routing import RouterConfig

__all__ = ["GptOss"]


class GptOss(Family):
    """Adapter of the family `gpt_oss`."""

    name = "gpt_oss"
    model_type = "gpt_oss"
    block = "GptOssMLP"
    norm = "GptOssRMSNorm"
    norm_formula = NormFormula(rounds_first=False)
    returns_scores = True
    own_attention = True  # sinks
    tensor_regions = MappingProxyType({"self_attn": GROUPED_QUERIES._replace(per_head=("sinks",))})
    hf_keys = HFKeys(packed=True, interleaved=True)

    def adapt(
        self, model: PreTrainedModel, moe: MoEConfig, *, kernels: Kernels = "none", force_load_balance: bool = False
    ) -> PreTrainedModel:
        model = super().adapt(model, moe, kernels=kernels, force_load_balance=force_load_balance)
        mask_documents(model)  # transformers' model makes its masks without position_ids.
        return model

    def read_block(self, block: Any, config: Any) -> Block:
        experts = block.experts
        if experts.alpha != QUICK_GELU_ALPHA:
            raise ValueError(f"swiglu_alpha is {experts.alpha}; experts compute {QUICK_GELU_ALPHA} alone")
        params = ExpertParams(
            halves_apart(experts.gate_up_proj),
            experts.down_proj,
            halves_apart(experts.gate_up_proj_bias),
            experts.down_proj_bias,
        )
        router = RouterConfig(config.num_local_experts, config.num_experts_per_tok, softmax_over="chosen", bias=True)
        formula = replace(GPT_OSS, limit=experts.limit)
        return Block(router, block.router.weight, params, formula, gate_bias=block.router.bias)
