"""Activation checkpointing of transformer blocks; the selective mode repeats no exchange."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from crossdock.comm import EXCHANGE_OPS
from crossdock.dispatch import DEEPEP_OPS, SYMMETRIC_OPS
from crossdock.experts import EXPERTS_OPS
from crossdock.parallel.blocks import block_lists

__all__ = ["ActivationCheckpointConfig", "apply_activation_checkpoint"]

# What the selective mode keeps beside exchanges: the outputs of products and attention, dear to compute and few.
_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


@dataclass(frozen=True)
class ActivationCheckpointConfig:
    """`[activation_checkpoint]`: what the forward pass keeps for the backward pass."""

    mode: Literal["none", "full", "selective"] = "none"
    """`full` keeps a block's input alone and runs it again, exchanges included; `selective` keeps products, attention
    and exchanges as well."""


def apply_activation_checkpoint(model: nn.Module, config: ActivationCheckpointConfig) -> nn.Module:
    """Checkpoint the activations of the transformer blocks of `model`, in place. After EP, before FSDP."""
    if config.mode == "none":
        return model
    options: dict[str, Any] = {}
    if config.mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for blocks in block_lists(model):
        for name, block in list(blocks.named_children()):
            setattr(blocks, name, checkpoint_wrapper(block, **options))
    return model


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = any(op in ops for ops in (EXCHANGE_OPS, DEEPEP_OPS, SYMMETRIC_OPS, EXPERTS_OPS, _PRODUCTS))
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
