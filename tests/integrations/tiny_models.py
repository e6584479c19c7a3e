"""Tiny models of transformers' MoE families in folders, and one training step on them on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

__all__ = ["FAMILIES", "full", "load", "loss_and_gradients", "token_ids", "write_model"]

VOCAB = 96

_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
        "layer_types": ["full_attention", "full_attention"],
    },
}


def write_model(folder: Path, family: str, **overrides: Any) -> Path:
    """Save a tiny model of `family` with seeded weights to `folder`; what to set on its config in `overrides`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_SHARED | FAMILIES[family] | overrides))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases too, which models start with zeros, and routers that some start with zeros.
            if "norm" not in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def load(folder: Path | str, layout: dict[str, Any] | None = None, experts: str | None = None) -> PreTrainedModel:
    """The model of `folder` in fp32 on `DistributedConfig(**layout)`, or on this rank alone."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kwargs: dict[str, Any] = {} if experts is None else {"experts_implementation": experts}
    if layout is not None:
        kwargs["distributed_config"] = DistributedConfig(**layout)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def token_ids(seed: int, batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def full(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    # A copy: a gathered tensor may be a view of what a later collective writes.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).float().numpy().copy()


def loss_and_gradients(model: nn.Module, ids: Tensor) -> tuple[float, dict[str, np.ndarray]]:
    """This rank's loss on `ids`, and all full gradients."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def data_rank(layout: dict[str, Any]) -> int:
    """Which batch this rank has: the ranks of a `tp` group share one."""
    return dist.get_rank() // layout.get("tp_size", 1)
