"""MiniMax-M2: sigmoid with an expert bias, Mixtral's names."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from crossdock.models.families.parts import MIXTRAL_KEYS, gated_block
from crossdock.models.family import GATED, Block, Family
from crossdock.routing import RouterConfig

__all__ = ["MiniMaxM2"]


class MiniMaxM2(Family):
    """Adapter of the family `minimax_m2`."""

    name = "minimax_m2"
    model_type = "minimax_m2"
    block = "MiniMaxM2SparseMoeBlock"
    norm = "MiniMaxM2RMSNorm"
    tensor_regions = MappingProxyType({"mlp": GATED})
    tensor_whole = ("self_attn",)  # its norms are over all heads
    hf_keys = replace(MIXTRAL_KEYS, expert_bias=True)

    def read_block(self, block: Any, config: Any) -> Block:
        router = RouterConfig(
            config.num_local_experts,
            config.num_experts_per_tok,
            "sigmoid",
            expert_bias=True,
            input_jitter=config.router_jitter_noise,
        )
        return gated_block(block, config, router, expert_bias=block.e_score_correction_bias)
