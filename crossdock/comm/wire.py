"""The dtype that rows travel in, whatever they are computed in.

fp8 keeps the precision of small values by a scale for each group of 128 neighbouring values of a row. Scales are powers
of two: dividing and multiplying by them rounds nothing, so that the one rounding is to e4m3's four bits, decoded values
fit bf16, and encoding decoded values again (`hierarchical`, which sends a token twice) changes none of them.

Nothing saturates. What is beyond a wire's range arrives as a bad number, which the trainer's policy sees, and not as
the largest number that fits; infinities and NaN stay bad numbers. Only what fp8 rounds up, from within the range of the
activations' dtype to beyond it, arrives as its largest number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.kernels import FP8_GROUP, dequantize_fp8, quantize_fp8

__all__ = ["UNTOUCHED", "Wire", "WireDtype"]

WireDtype = Literal["same", "bf16", "fp16", "fp8"]
"""In which rows travel."""

_PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Wire:
    """What rows `[S, H]` of activations look like while they travel.

    Within a wire's range a value `x` arrives within `u |x|`: `u = 2^-8` for `bf16`, `2^-11` for `fp16`, `2^-4` for
    `fp8`, which is e4m3. Its scales map the largest finite value of a group to more than 224 and at most 448, so that
    normal numbers, from `2^-6` on, reach down to `2^-15` of it; below, the error is at most `2^-10 / 224` of it.

    Attributes:
        dtype: `same` as the activations'; where nothing would be saved, rows travel untouched as well.
        both: whether results on their way back and all gradients travel so too, or the forward pass's tokens alone.
    """

    dtype: WireDtype = "same"
    both: bool = False

    @property
    def back(self) -> Wire:
        """The wire of results, and of gradients in both directions."""
        return self if self.both else UNTOUCHED

    def row_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """Bytes of a row of `H` values of `dtype` while it travels."""
        return min(hidden_size * dtype.itemsize, self._encoded_bytes(hidden_size, dtype))

    def leaves(self, hidden_size: int, dtype: torch.dtype) -> bool:
        """Whether rows of `H` values of `dtype` travel untouched."""
        return self._encoded_bytes(hidden_size, dtype) >= hidden_size * dtype.itemsize

    def _encoded_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        if self.dtype == "same":
            return hidden_size * dtype.itemsize
        if self.dtype == "fp8":
            return 4 * (_ceil_div(hidden_size, 4) + _ceil_div(hidden_size, FP8_GROUP))
        return 2 * hidden_size

    def placeholder(self, rows: Tensor) -> Tensor:
        """A tensor without memory that has shape and dtype of `encode(rows)`: what autograd compares gradients with."""
        size, dtype = rows.shape[-1], rows.dtype
        if self.leaves(size, dtype):
            return rows.new_empty(()).expand(rows.shape)
        if self.dtype == "fp8":
            return rows.new_empty((), dtype=torch.float32).expand(len(rows), self._encoded_bytes(size, dtype) // 4)
        return rows.new_empty((), dtype=_PLAIN[self.dtype]).expand(rows.shape)

    def encode(self, rows: Tensor) -> Tensor:
        """`rows [S, H]` as they travel: `rows` themselves, `[S, H]` in bf16 or fp16, or `_encode_fp8`'s bytes."""
        if self.leaves(rows.shape[-1], rows.dtype):
            return rows
        return _encode_fp8(rows) if self.dtype == "fp8" else rows.to(_PLAIN[self.dtype])

    def decode(self, sent: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """What `encode` made of rows of `hidden_size` values of `dtype`, `[S, H]` in that dtype again."""
        if self.leaves(hidden_size, dtype):
            return sent
        return _decode_fp8(sent, hidden_size, dtype) if self.dtype == "fp8" else sent.to(dtype)


UNTOUCHED = Wire()
"""Rows travel as they are."""


def _encode_fp8(rows: Tensor) -> Tensor:
    """`rows [S, H]` as bytes: `H` values of e4m3, zeros up to a multiple of 4, and the fp32 scales of their groups.

    A byte buffer that is handed around as fp32 `[S, bytes / 4]`: collectives copy it bit by bit on every backend, gloo
    (which has no fp8) included, scales start where fp32 may, and autograd carries it, as it does no integers.
    """
    values, scales = quantize_fp8(rows)
    padded = F.pad(values.view(torch.uint8), (0, -rows.shape[1] % 4)).contiguous()
    return torch.cat([padded.view(torch.float32), scales], dim=1)


def _decode_fp8(sent: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    words = _ceil_div(hidden_size, 4)
    values = sent[:, :words].contiguous().view(torch.float8_e4m3fn)[:, :hidden_size]
    return dequantize_fp8(values, sent[:, words:], dtype)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
