"""OLMoE: softmax before top-k, weights not normalised (arXiv 2409.02060)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from crossdock.models.families.parts import QWEN_KEYS, gated_block, softmax_router
from crossdock.models.family import GATED, Block, Family

__all__ = ["Olmoe"]


class Olmoe(Family):
    """Adapter of the family `olmoe`."""

    name = "olmoe"
    model_type = "olmoe"
    block = "OlmoeSparseMoeBlock"
    norm = "OlmoeRMSNorm"
    tensor_regions = MappingProxyType({"mlp": GATED})
    tensor_whole = ("self_attn",)  # its norms are over all heads
    hf_keys = QWEN_KEYS

    def read_block(self, block: Any, config: Any) -> Block:
        return gated_block(block, config, softmax_router(config))
