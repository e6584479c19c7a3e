"""Tokens in FP8 while they travel: e4m3 with a scale for each 128 values of a row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantise", "quantise"]

# Values per scale, and the largest e4m3 value.
_BLOCK, _LARGEST = 128, 448.0


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [T, H]` as e4m3 `[T, H]` and fp32 scales `[T, H / 128]`: a block's largest magnitude over 448.

    e4m3 has 3 bits of mantissa, so a value is within 1/16 of itself, or within the block's largest over 448 * 2^10
    where it is subnormal. NaN stays; infinity makes a block NaN.
    """
    blocks = x.float().view(len(x), x.shape[1] // _BLOCK, _BLOCK)
    scales = blocks.abs().amax(dim=2).clamp_min(1e-4) / _LARGEST
    return (blocks / scales[:, :, None]).to(torch.float8_e4m3fn).view(x.shape), scales


def dequantise(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` was given, rounded: `[U, H]` in `dtype`."""
    blocks = values.to(scales.dtype).view(*scales.shape, _BLOCK)
    return (blocks * scales[:, :, None]).to(dtype).view(values.shape)
