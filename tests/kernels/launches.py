"""Launches of kernels, at sizes that people train with, for tests/kernels/hopper.py."""

from __future__ import annotations

import torch

from crossdock.experts import GPT_OSS, SWIGLU, ExpertParams, triton
from crossdock.kernels import (
    KERNELS,
    ROW_BUCKETS,
    Scoring,
    TileTable,
    candidates,
    counting_sort,
    decide,
    fused_quick_geglu_prob,
    fused_silu_gate_prob,
    permute,
    quantize_fp8,
)

__all__ = ["all_tiles", "default_tiles", "elementwise", "least_sizes", "usual_experts"]


def _experts(
    tiles: TileTable | None = None,
    rows_per_slot: int = 1024,
    *,
    bias: bool = False,
    transposed: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    num_slots, hidden, inner, top_k = 4, 2048, 768, 2
    tokens = torch.empty(rows_per_slot * num_slots // top_k, hidden, dtype=dtype, requires_grad=True)
    slot_ids = torch.zeros(len(tokens), top_k, dtype=torch.int64)
    weights = torch.empty(len(tokens), top_k, requires_grad=True)
    shapes = [(num_slots, hidden, 2 * inner), (num_slots, inner, hidden)]
    params = [torch.empty(shape, dtype=dtype) for shape in shapes]
    if transposed:
        params = [param.mT.contiguous().mT for param in params]
    if bias:
        params += [torch.empty(num_slots, size, dtype=dtype) for size in (2 * inner, hidden)]
    given = ExpertParams(*(param.requires_grad_() for param in params))
    y = triton(tokens, slot_ids, weights, given, GPT_OSS if bias else SWIGLU, static=True, tiles=tiles)
    y.sum().backward()


def usual_experts() -> None:
    """bfloat16, SwiGLU, a thousand rows per slot."""
    _experts()


def default_tiles() -> None:
    """Few rows per slot and some; with biases; matrices the other way round; float32."""
    for rows in (16, 64):
        _experts(rows_per_slot=rows)
    _experts(bias=True)
    _experts(transposed=True)
    _experts(dtype=torch.float32)


def all_tiles() -> None:
    """Every candidate of every kernel."""
    for bucket in ROW_BUCKETS:
        choices = {kernel: candidates(kernel, bucket) for kernel in KERNELS}
        for index in range(max(map(len, choices.values()))):
            tiles = {(kernel, bucket): each[min(index, len(each) - 1)] for kernel, each in choices.items()}
            _experts(TileTable(tiles), bucket)


def elementwise() -> None:
    """What moves rows and computes value by value."""
    halves = torch.empty(64, 2048, dtype=torch.bfloat16, requires_grad=True)
    for weight in (torch.empty(64, requires_grad=True), None):
        for function in (fused_silu_gate_prob, fused_quick_geglu_prob):
            function(halves, prob=weight).sum().backward()
    order, _, row_of_route = counting_sort(torch.zeros(64, 8, dtype=torch.int64), 16)
    permute(halves, order, row_of_route).sum().backward()
    quantize_fp8(halves.detach())
    for num_experts, scoring in ((128, Scoring(8)), (256, Scoring(8, "sigmoid")), (64, Scoring(4, over_chosen=True))):
        logits = torch.empty(64, num_experts, requires_grad=True)
        bias, mask = torch.empty(num_experts), torch.empty(64, dtype=torch.bool)
        decide(logits, scoring, bias, mask).weights.sum().backward()


def least_sizes() -> None:
    """One token, one slot, one expert: numbers that the compiler takes for constants."""
    tokens = torch.empty(1, 16, dtype=torch.bfloat16, requires_grad=True)
    slot_ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.empty(1, 1, requires_grad=True)
    params = ExpertParams(*(torch.empty(1, 16, each, dtype=torch.bfloat16).requires_grad_() for each in (32, 16)))
    triton(tokens, slot_ids, weights, params, static=True).sum().backward()
    decide(torch.empty(1, 1, requires_grad=True), Scoring(1, normalise=False)).weights.sum().backward()
