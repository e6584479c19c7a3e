"""Qwen2-MoE: softmax before top-k; a shared expert behind a gate (arXiv 2407.10671)."""

from __future__ import annotations

from typing import Any

from crossdock.models.families.parts import SHARED_KEYS, gated_block, softmax_router
from crossdock.models.family import Block, Family

__all__ = ["Qwen2"]


class Qwen2(Family):
    """Adapter of the family `qwen2`."""

    name = "qwen2"
    model_type = "qwen2_moe"
    block = "Qwen2MoeSparseMoeBlock"
    norm = "Qwen2MoeRMSNorm"
    hf_keys = SHARED_KEYS

    def read_block(self, block: Any, config: Any) -> Block:
        return gated_block(
            block,
            config,
            softmax_router(config),
            shared=block.shared_expert,
            shared_gate=block.shared_expert_gate,
        )
