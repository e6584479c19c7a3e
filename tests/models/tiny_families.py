"""Tiny models of all families, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from crossdock.models import FAMILIES

__all__ = ["SIZES", "sizes_of", "write_config", "write_family"]

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
# Five experts divide over no number of ranks, eight are in groups; the first or second layer is dense where it can be.
SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **_MLA,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {
        **_MLA,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    },
    "glm4": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        "intermediate_size": 16,
        "num_local_experts": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": 8,
    },
    "llama4": {
        "intermediate_size": 16,
        "intermediate_size_mlp": 48,
        "num_local_experts": 5,
        "interleave_moe_layer_step": 2,
    },
    "minimax_m2": {"intermediate_size": 16, "num_local_experts": 5, "rotary_dim": 4},
    "mixtral": {"intermediate_size": 16, "num_local_experts": 5, "head_dim": None},
    "olmoe": {"intermediate_size": 16, "num_experts": 5, "head_dim": None},
    "qwen2": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 5,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 5,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 5,
        "shared_expert_intermediate_size": 24,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}


def sizes_of(name: str, **overrides: Any) -> dict[str, Any]:
    """What the configuration of a tiny model of the family `name` is made with."""
    return {key: value for key, value in (_COMMON | SIZES[name] | overrides).items() if value is not None}


def write_config(folder: Path, name: str, **overrides: Any) -> PreTrainedConfig:
    """Save that configuration."""
    config = CONFIG_MAPPING[FAMILIES[name].model_type](**sizes_of(name, **overrides))
    config.save_pretrained(folder)
    return config


def write_family(folder: Path, name: str, **overrides: Any) -> Path:
    """Save a tiny model of the family `name` with seeded weights, none of them 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(write_config(folder, name, **overrides))
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in tensor_name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif "A_log" not in tensor_name and "inv_freq" not in tensor_name:
                nn.init.normal_(tensor, std=0.1)
    model.save_pretrained(folder)
    return folder
