"""Tiny models of every family of transformers that declares an expert-parallel plan."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, cast

import torch
import transformers.models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

__all__ = ["families_with_a_plan", "model_class", "tiny_config", "tiny_model"]

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
_MLA = {"num_key_value_heads": 4, "head_dim": 8}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_text": {**_MLA, "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "diffusion_gemma_text": {"num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16},
    "dots1": {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": _MLA,
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "glm4_moe_lite": _MLA,
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "hidden_size_per_layer_input": 0,
    },
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "glm5_next_text": {**_MLA, "qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse"]},
    "glm_moe_dsa": _MLA,
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "mistral_large4_text": _MLA,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "step3p5": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "moe_layers_enum": "1"},
    "unlimited_ocr_text": {**_MLA, "mlp_layer_types": ["dense", "sparse"]},
    "zaya": {"num_experts_per_tok": 1},
}


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
                found.setdefault(value.model_type, value)  # type: ignore[attr-defined]
    return dict(sorted(found.items()))


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of a few thousand parameters."""
    usual = config_class().to_dict()
    sizes = {name: value for name, value in _SMALL.items() if usual.get(name) is not None}
    sizes |= {name: 0.0 for name in usual if name.endswith(("dropout", "jitter_noise"))}
    config = config_class(**sizes | _OVERRIDES.get(config_class.model_type, {}))
    config._attn_implementation = "eager"
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' causal language model of this configuration, or the text model of a multimodal one."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return cast(Any, AutoModelForCausalLM._model_mapping[type(config)])
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    values = (value for value in vars(module).values() if isinstance(value, type))
    models = [value for value in values if issubclass(value, PreTrainedModel) and value.__module__ == module.__name__]
    own = [model for model in models if model.config_class is type(config)]
    return next(model for model in own if model.__name__.endswith("Model") and "PreTrained" not in model.__name__)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' model with seeded weights, none of them 0."""
    torch.manual_seed(0)
    model = model_class(config)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "A_log" not in name:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()
