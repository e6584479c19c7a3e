"""Qwen3-MoE: softmax before top-k, weights normalised, no shared expert (arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeSparseMoeBlock,
)

from crossdock.checkpoint import HFKeys
from crossdock.models.family import Kernels
from crossdock.models.loss import LossHead
from crossdock.models.norm import build_norm
from crossdock.models.padding import accept_padding_mask
from crossdock.moe import MoE
from crossdock.moe_config import MoEConfig
from crossdock.routing import RouterConfig

__all__ = ["Qwen3"]

_COMMON = {"norm_topk_prob": True, "tie_word_embeddings": False, "head_dim": 128, "rms_norm_eps": 1e-6}
_PUBLISHED = _COMMON | {
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}


class Qwen3:
    """Adapter of the family `qwen3` (contract: `Family`)."""

    name = "qwen3"
    model_type = "qwen3_moe"
    hf_keys = HFKeys(renamed=((".mlp.router.weight", ".mlp.gate.weight"),))
    flavors: Mapping[str, Mapping[str, Any]] = MappingProxyType(
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

    def hf_config(self, flavor: str) -> PreTrainedConfig:
        return Qwen3MoeConfig(**self.flavors[flavor])

    def hf_config_from(self, folder: Path) -> PreTrainedConfig:
        return Qwen3MoeConfig.from_pretrained(folder, local_files_only=True)

    def build(self, hf_config: PreTrainedConfig) -> PreTrainedModel:
        return Qwen3MoeForCausalLM(cast(Qwen3MoeConfig, hf_config))

    def adapt(
        self, model: PreTrainedModel, moe: MoEConfig, *, kernels: Kernels = "none", force_load_balance: bool = False
    ) -> PreTrainedModel:
        # The auxiliary losses are ours, so that transformers need not collect logits that no module of its own makes.
        model.config.output_router_logits = False
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Qwen3MoeSparseMoeBlock):
                    setattr(module, name, _moe(child, cast(Qwen3MoeConfig, model.config), moe, force_load_balance))
                elif isinstance(child, Qwen3MoeRMSNorm):
                    setattr(module, name, build_norm(child.weight, child.variance_epsilon, kernels))
        model.set_output_embeddings(LossHead(cast(nn.Linear, model.get_output_embeddings()), kernels))
        accept_padding_mask(model)
        return model

    def reset_buffers(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, Qwen3MoeRotaryEmbedding):
                with torch.device("cpu"):
                    fresh = Qwen3MoeRotaryEmbedding(module.config)
                for name, buffer in fresh.named_buffers():
                    module.get_buffer(name).copy_(buffer)


@torch.no_grad()
def _moe(block: Qwen3MoeSparseMoeBlock, config: Qwen3MoeConfig, moe: MoEConfig, force_load_balance: bool) -> MoE:
    """The block as a `MoE` of the same device and dtype: projections are transposed, gate stays before up."""
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {config.hidden_act!r}; experts compute silu alone")
    router = RouterConfig(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        force_load_balance=force_load_balance,
    )
    gate_up_proj, down_proj = cast(Tensor, block.experts.gate_up_proj), cast(Tensor, block.experts.down_proj)
    with gate_up_proj.device:
        layer = MoE(config.hidden_size, config.moe_intermediate_size, router, moe).to(gate_up_proj.dtype)
    layer.router.weight.copy_(block.gate.weight)
    layer.experts.gate_and_up_projs.copy_(gate_up_proj.transpose(1, 2))
    layer.experts.down_projs.copy_(down_proj.transpose(1, 2))
    return layer
