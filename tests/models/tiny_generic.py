"""Tiny models of every family of transformers that declares an expert-parallel plan."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch
import transformers.models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

__all__ = ["families_with_a_plan", "tiny_config", "tiny_model"]

# What configurations call their sizes, and what is small.
_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a family needs beyond that.
_OVERRIDES: dict[str, dict[str, Any]] = {}


def families_with_a_plan() -> dict[str, type[PreTrainedConfig]]:
    """The configuration classes that declare a `base_model_ep_plan`, by model_type."""
    found: dict[str, type[PreTrainedConfig]] = {}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{package.name}.configuration_{package.name}"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == name and getattr(value, "base_model_ep_plan", None):
                found[value.model_type] = value  # type: ignore[attr-defined]
    return dict(sorted(found.items()))


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of a few thousand parameters."""
    usual = config_class()
    sizes = {name: value for name, value in _SMALL.items() if getattr(usual, name, None) is not None}
    config = config_class(**sizes | _OVERRIDES.get(config_class.model_type, {}))
    config._attn_implementation = "eager"
    return config


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' model with seeded weights, none of them 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "A_log" not in name:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()
