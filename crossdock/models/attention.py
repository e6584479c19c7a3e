"""Eager attention that keeps float64: transformers' own takes its softmax in fp32 whatever the model's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

__all__ = ["WIDE_ATTENTION", "register_wide_attention"]

WIDE_ATTENTION = "crossdock_eager"
"""The name under which transformers finds `wide_attention`."""


def wide_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """`softmax(q k^T * scaling + mask) v` with the softmax in fp32, or float64 where `query` is.

    Args:
        query: `[B, heads, S, D]`.
        key, value: `[B, key heads, S', D]`; the number of heads is a multiple of that of key heads.
        attention_mask: `[B, 1, S, S']`, added to the scores.

    Returns:
        `[B, S, heads, D]`, and the attention weights `[B, heads, S, S']`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def register_wide_attention() -> str:
    """Make `wide_attention` known to transformers, which looks attention up by name; returns the name."""
    AttentionInterface.register(WIDE_ATTENTION, wide_attention)
    AttentionMaskInterface.register(WIDE_ATTENTION, eager_mask)
    return WIDE_ATTENTION
