"""Ring attention by torch's own: each rank keeps its queries, keys and values go round (arXiv 2310.01889)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor.experimental._context_parallel._attention import (
    _cp_options,
    _templated_ring_attention,
    _templated_ring_attention_backward,
)

__all__ = ["ring_attention"]

_POSITIONS = 2  # The dimension of them.


def ring_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, group: dist.ProcessGroup) -> Tensor:
    """Causal attention of this rank's positions to all that come before, those of lower ranks among them.

    Ranks with later positions have more to compute: the others wait for them. torch merges the parts in fp32.

    Args:
        query: `[B, heads, S/R, D]`.
        key, value: `[B, key heads, S/R, D]`; the number of heads is a multiple of that of key heads.
        scale: of the scores.
        group: the ranks that share the sequences, in order.

    Returns:
        `[B, S/R, heads, D]`.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    output: Any = _RingAttention.apply(query, key, value, scale, group)
    return output.transpose(1, 2)


class _RingAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, group: dist.ProcessGroup) -> Tensor:
        op: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if query.device.type != "cpu":
            op = torch.ops.aten._scaled_dot_product_flash_attention
        with _contiguous_parts():
            output, logsumexp, *rest = _templated_ring_attention(
                group, _POSITIONS, op, query, key, value, is_causal=True, dropout_p=0.0, scale=scale
            )
        output = output.to(query.dtype)
        ctx.scale, ctx.group = scale, group
        ctx.lengths = rest[2:4]
        ctx.save_for_backward(query, key, value, output, logsumexp, *rest[:2], *rest[4:6])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, output, logsumexp, *rest = ctx.saved_tensors
        op: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        options: dict[str, Any] = {"dropout_p": 0.0, "scale": ctx.scale}
        if query.device.type != "cpu":
            op = torch.ops.aten._scaled_dot_product_flash_attention_backward
            options |= dict(zip(("cum_seq_q", "cum_seq_k", "philox_seed", "philox_offset"), rest, strict=True))
            options |= dict(zip(("max_q", "max_k"), ctx.lengths, strict=True))
        tensors = (query, key, value, output, logsumexp)
        with _contiguous_parts():
            gradients = _templated_ring_attention_backward(
                ctx.group, _POSITIONS, op, grads[0].contiguous(), "grad_out", *tensors, is_causal=True, **options
            )
        return *(gradient.to(query.dtype) for gradient in gradients[:3]), None, None


@contextmanager
def _contiguous_parts() -> Iterator[None]:
    """Tell torch that a rank's positions follow one another, which it takes for two pieces of a sequence otherwise."""
    before, _cp_options.enable_load_balance = _cp_options.enable_load_balance, False
    try:
        yield
    finally:
        _cp_options.enable_load_balance = before
