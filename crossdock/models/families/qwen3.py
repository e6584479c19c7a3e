"""Qwen3-MoE: softmax before top-k, weights normalised, no shared expert (arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from crossdock.models.families.parts import QWEN_KEYS, gated_block, softmax_router
from crossdock.models.family import Block, Family

__all__ = ["Qwen3"]

_COMMON = {"norm_topk_prob": True, "tie_word_embeddings": False, "head_dim": 128, "rms_norm_eps": 1e-6}
_PUBLISHED = _COMMON | {
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}


class Qwen3(Family):
    """Adapter of the family `qwen3`."""

    name = "qwen3"
    model_type = "qwen3_moe"
    block = "Qwen3MoeSparseMoeBlock"
    norm = "Qwen3MoeRMSNorm"
    hf_keys = QWEN_KEYS
    flavors: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {
            "debug": _COMMON
            | {
                "vocab_size": 8192,
                "hidden_size": 240,
                "intermediate_size": 480,
                "moe_intermediate_size": 240,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 64,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 4096,
            },
            "10B-A1B": _PUBLISHED
            | {
                "hidden_size": 1024,
                "intermediate_size": 3072,
                "moe_intermediate_size": 512,
                "num_hidden_layers": 48,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
            },
            "30B-A3B": _PUBLISHED
            | {
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
            },
            "235B-A22B": _PUBLISHED
            | {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "moe_intermediate_size": 1536,
                "num_hidden_layers": 94,
                "num_attention_heads": 64,
                "num_key_value_heads": 4,
            },
        }
    )

    def read_block(self, block: Any, config: Any) -> Block:
        return gated_block(block, config, softmax_router(config))
