"""FP8: e4m3 with one fp32 scale per 128 values of the last dimension, as DeepEP sends tokens.

Scales are powers of two: dividing and multiplying by them rounds nothing, so that the one rounding is to e4m3's four
bits, what comes back fits bf16, and quantizing it again changes nothing.

Conversion to e4m3 is done on the bits: it needs no FP8 unit, and Triton's interpreter rounds such casts wrongly. e4m3
has a sign, 4 bits of exponent (bias 7) and 3 of mantissa: normal from 2^-6 to 448, multiples of 2^-9 below that; 0x7f
is NaN.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from crossdock.kernels.runtime import cdiv, device_of, jit, runs, tl

__all__ = [
    "FP8_GROUP",
    "FP8_LIMITS",
    "dequantize_fp8",
    "e4m3_values",
    "quantize_fp8",
    "quantize_fp8_reference",
    "quantize_groups",
]

FP8_GROUP = 128
"""Values of a row that share a scale."""
_LARGEST = 448.0
_SMALLEST_SCALE, _LARGEST_FINITE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_BLOCK_ROWS, _NUM_WARPS = 16, 4
FP8_LIMITS = MappingProxyType(
    {"LARGEST": _LARGEST, "SMALLEST_SCALE": _SMALLEST_SCALE, "LARGEST_FINITE": _LARGEST_FINITE}
)
"""What `quantize_groups` needs to know in a kernel."""


@torch.no_grad()
def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [..., D]` to `(values [..., D] float8_e4m3fn, scales [..., ceil(D / 128)] fp32)`, `x ~ values * scale`.

    A group's scale is the smallest power of two that maps its largest finite magnitude to 448 at most (at least the
    smallest normal fp32 number, so a group of zeros has one too); values are rounded to nearest even. NaN and
    infinities, which e4m3 lacks, become NaN in their places. No gradient passes.
    """
    if not runs(x):
        return quantize_fp8_reference(x)
    width = x.shape[-1]
    rows = x.reshape(-1, width) if x.numel() else x.new_empty(0, width)
    num_groups = cdiv(width, FP8_GROUP)
    values = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*x.shape[:-1], num_groups, device=x.device)
    if len(rows):
        with device_of(x):
            _quantize_kernel[(cdiv(len(rows), _BLOCK_ROWS), num_groups)](
                *(rows, values, scales),
                *(len(rows), width, num_groups, rows.stride(0), rows.stride(1)),
                GROUP=FP8_GROUP,
                LARGEST=_LARGEST,
                SMALLEST_SCALE=_SMALLEST_SCALE,
                LARGEST_FINITE=_LARGEST_FINITE,
                BLOCK_ROWS=_BLOCK_ROWS,
                num_warps=_NUM_WARPS,
            )
    return values.view(torch.float8_e4m3fn), scales


@torch.no_grad()
def quantize_fp8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `quantize_fp8` computes, by torch's own conversion."""
    width = x.shape[-1]
    num_groups = cdiv(width, FP8_GROUP)
    wide = x.to(torch.float32)
    padded = torch.nn.functional.pad(wide, (0, num_groups * FP8_GROUP - width)).unflatten(-1, (num_groups, FP8_GROUP))
    # Conversions disagree on what becomes of infinity: NaN, or the largest number.
    bad = ~padded.isfinite()
    scales = _power_of_two(padded.masked_fill(bad, 0).abs().amax(-1) / _LARGEST)
    values = (padded / scales[..., None]).masked_fill(bad, torch.nan).flatten(-2)[..., :width]
    return values.to(torch.float8_e4m3fn), scales


def _power_of_two(values: Tensor) -> Tensor:
    """The smallest powers of two that are not below `values`, fp32, at least the smallest normal number.

    Adding all bits of the mantissa but one unit carries into the exponent unless the mantissa is 0.
    """
    bits = values.clamp_min(_SMALLEST_SCALE).view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def dequantize_fp8(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of `values [..., D]` and their groups' `scales [..., ceil(D / 128)]`, in fp32, rounded to `dtype`.

    Rounding up to e4m3 can lift a value near the largest of `dtype` beyond it: it is that largest one then. `values`
    hold no infinity that could be meant.
    """
    per_value = scales.repeat_interleave(FP8_GROUP, dim=-1)[..., : values.shape[-1]]
    largest = min(torch.finfo(dtype).max, _LARGEST_FINITE)
    return (values.to(torch.float32) * per_value).clamp_(-largest, largest).to(dtype)


@jit
def _e4m3_bits(x):
    """fp32 of magnitude 448 at most, or NaN, to the nearest e4m3 number's byte, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = (bits >> 24) & 0x80
    # Round off 20 of 23 bits of mantissa (a carry goes to the exponent, as it should), then change the bias 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # In 2^14 .. 2^15 fp32 numbers are 2^-9 apart: adding 2^14 rounds to a multiple of it and leaves which in the bits.
    subnormal = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    number = tl.where(magnitude < (121 << 23), subnormal, normal)
    return (tl.where(magnitude > 0x7F800000, 0x7F, number) | sign).to(tl.uint8)


@jit
def quantize_groups(
    x,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    LARGEST_FINITE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """In a kernel: fp32 `[BLOCK_ROWS, GROUP]`, a group per row, to the bytes of e4m3 numbers and scales `[BLOCK_ROWS]`.

    `LARGEST`, `SMALLEST_SCALE` and `LARGEST_FINITE` are `FP8_LIMITS`.
    """
    finite = tl.abs(x) <= LARGEST_FINITE  # false for NaN
    largest = tl.max(tl.where(finite, tl.abs(x), 0), axis=1)
    # A plain division is a few units in the last place off, and its flushing of small numbers would make NaN.
    scale = tl.div_rn(largest, tl.full([BLOCK_ROWS], LARGEST, tl.float32))
    bits = tl.maximum(scale, SMALLEST_SCALE).to(tl.uint32, bitcast=True)
    scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)  # as `_power_of_two`
    quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], [BLOCK_ROWS, GROUP]))
    return _e4m3_bits(tl.where(finite, quotient, float("nan"))), scale


@jit
def e4m3_values(numbers):
    """In a kernel: bytes of e4m3 numbers to fp32, exactly."""
    bits = numbers.to(tl.uint32)
    magnitude = bits & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(bits >= 128, -value, value)


@jit
def _quantize_kernel(
    x_ptr,  # [num_rows, width]
    values_ptr,  # [num_rows, width] bytes, contiguous
    scales_ptr,  # [num_rows, num_groups] fp32
    num_rows,
    width,
    num_groups,
    row_stride,
    column_stride,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    LARGEST_FINITE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1)
    column = (group * GROUP + tl.arange(0, GROUP))[None, :]
    mask = (row < num_rows)[:, None] & (column < width)
    x = tl.load(x_ptr + row[:, None] * row_stride + column * column_stride, mask=mask, other=0).to(tl.float32)
    values, scale = quantize_groups(x, LARGEST, SMALLEST_SCALE, LARGEST_FINITE, BLOCK_ROWS, GROUP)
    tl.store(values_ptr + row[:, None] * width + column, values, mask=mask)
    tl.store(scales_ptr + row * num_groups + group, scale, mask=row < num_rows)
