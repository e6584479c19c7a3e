"""torchtitan's names of Qwen3-MoE's and DeepSeek-V3's tensors (0.3, and of 0.1 and 0.2 where they differ)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["TORCHTITAN_FAMILIES", "torchtitan_names"]

TORCHTITAN_FAMILIES = ("qwen3", "deepseek_v3")
"""Ours, whose attention torchtitan computes with the weights in Hugging Face's order."""

# Hugging Face's name, that of a layer without `model.layers.N.`, to torchtitan's, the newest first.
_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model.embed_tokens.weight": ("tok_embeddings.weight",),
        "model.norm.weight": ("norm.weight",),
        "lm_head.weight": ("lm_head.weight", "output.weight"),
        "input_layernorm.weight": ("attention_norm.weight",),
        "post_attention_layernorm.weight": ("ffn_norm.weight",),
        "self_attn.q_proj.weight": ("attention.qkv_linear.wq.weight", "attention.wq.weight"),
        "self_attn.k_proj.weight": ("attention.qkv_linear.wk.weight", "attention.wk.weight"),
        "self_attn.v_proj.weight": ("attention.qkv_linear.wv.weight", "attention.wv.weight"),
        "self_attn.o_proj.weight": ("attention.wo.weight",),
        "self_attn.q_norm.weight": ("attention.q_norm.weight",),
        "self_attn.k_norm.weight": ("attention.k_norm.weight",),
        "self_attn.q_a_proj.weight": ("attention.wq_a.weight",),
        "self_attn.q_a_layernorm.weight": ("attention.q_norm.weight",),
        "self_attn.q_b_proj.weight": ("attention.wq_b.weight",),
        "self_attn.kv_a_proj_with_mqa.weight": ("attention.wkv_a.weight",),
        "self_attn.kv_a_layernorm.weight": ("attention.kv_norm.weight",),
        "self_attn.kv_b_proj.weight": ("attention.wkv_b.weight",),
        "mlp.gate_proj.weight": ("feed_forward.w1.weight",),
        "mlp.up_proj.weight": ("feed_forward.w3.weight",),
        "mlp.down_proj.weight": ("feed_forward.w2.weight",),
        "mlp.gate.weight": ("moe.router.gate.weight",),
        "mlp.gate.e_score_correction_bias": ("moe.expert_bias_E", "moe.expert_bias"),
        "mlp.shared_experts.gate_proj.weight": ("moe.shared_experts.w1.weight",),
        "mlp.shared_experts.up_proj.weight": ("moe.shared_experts.w3.weight",),
        "mlp.shared_experts.down_proj.weight": ("moe.shared_experts.w2.weight",),
        # All experts: [E, I, H], [E, I, H] and [E, H, I].
        "mlp.experts.{}.gate_proj.weight": ("moe.routed_experts.inner_experts.w1_EFD", "moe.experts.w1"),
        "mlp.experts.{}.up_proj.weight": ("moe.routed_experts.inner_experts.w3_EFD", "moe.experts.w3"),
        "mlp.experts.{}.down_proj.weight": ("moe.routed_experts.inner_experts.w2_EDF", "moe.experts.w2"),
    }
)


def torchtitan_names(name: str) -> tuple[str, ...]:
    """What torchtitan may call the tensor that Hugging Face calls `name`; of an expert, the tensor of all. May be none.

    Args:
        name: of Qwen3-MoE or DeepSeek-V3.
    """
    layer, rest = "", name
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        layer, rest = f"layers.{match[1]}.", match[2]
    rest = re.sub(r"^mlp\.experts\.\d+\.", "mlp.experts.{}.", rest)
    return tuple(f"{layer}{theirs}" for theirs in _NAMES.get(rest, ()))
