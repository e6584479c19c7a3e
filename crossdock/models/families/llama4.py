"""Llama 4: sigmoid of the chosen logits, multiplied into an expert's input; a shared expert."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from crossdock.checkpoint import HFKeys
from crossdock.experts import ExpertParams
from crossdock.models.family import GATED, GROUPED_QUERIES, Block, Family, formula_of
from crossdock.routing import RouterConfig

__all__ = ["Llama4"]


class Llama4(Family):
    """Adapter of the family `llama4`: the text model."""

    name = "llama4"
    model_type = "llama4_text"
    block = "Llama4TextMoe"
    norm = "Llama4TextRMSNorm"
    tensor_regions = MappingProxyType({"self_attn": GROUPED_QUERIES, "feed_forward": GATED})
    returns_scores = True
    peft_swaps = True
    hf_keys = HFKeys(renamed=((".feed_forward.shared_experts.", ".feed_forward.shared_expert."),), packed=True)

    def read_block(self, block: Any, config: Any) -> Block:
        router = RouterConfig(config.num_local_experts, config.num_experts_per_tok, "sigmoid", norm_topk_prob=False)
        return Block(
            router,
            block.router.weight,
            ExpertParams(block.experts.gate_up_proj, block.experts.down_proj),
            formula_of(config.hidden_act, weight_on="input"),
            shared=block.shared_expert,
        )
