"""Tensors as a checkpoint stores them, plain or quantised, read as floating values.

Two kinds of quantised weights are known (docs/semantics.md, "Checkpoints on disk"):

- FP8 in blocks, `NAME [..., A, B]` in E4M3 beside `NAME_scale_inv`: a factor for each block of 128 x 128 values (or as
  many as config.json says) of the last two dimensions, or one factor for all.
- MXFP4, `NAME_blocks [E, B, A/32, 16]` beside `NAME_scales [E, B, A/32]`: two E2M1 values in a byte, low half first,
  and a power of two for each 32 of them, biased by 127. It stands for `NAME [E, A, B]`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from crossdock.checkpoint.hf_files import DTYPES, Header

__all__ = ["Reader", "Stored", "block_size", "stored_tensors"]

_SCALE = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"
_MXFP4_GROUP = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_DEFAULT_BLOCK = (128, 128)
_SCALE_DTYPES = (*DTYPES, "F8_E8M0")


class Reader(Protocol):
    """Where the tensors are that headers tell of: files, or memory."""

    def read(self, header: Header, bounds: Sequence[tuple[int, int]]) -> Tensor:
        """What lies within `bounds`, of each dimension."""
        ...


class Stored(ABC):
    """A tensor of a checkpoint.

    Attributes:
        dtype: of `DTYPES`, in which it would be written again; another one's name where it cannot be read.
        shape: of its values.
        problem: why it cannot be read, empty where it can.
        is_plain: whether its values are stored as they are.
    """

    dtype: str
    shape: tuple[int, ...]
    problem: str = ""
    is_plain: bool = False

    @abstractmethod
    def read(self, files: Reader, bounds: Sequence[tuple[int, int]]) -> Tensor:
        """The values within `bounds`, of each dimension."""


class _Plain(Stored):
    is_plain = True

    def __init__(self, header: Header) -> None:
        self.header = header
        self.dtype, self.shape = header.dtype, header.shape
        if self.dtype not in DTYPES:
            self.problem = f"is {self.dtype}; {', '.join(DTYPES)} can be read, and FP8 and MXFP4 beside their scales"

    def read(self, files: Reader, bounds: Sequence[tuple[int, int]]) -> Tensor:
        return files.read(self.header, bounds)


class _BlockFP8(Stored):
    """Values times the factor of their block."""

    dtype = "BF16"

    def __init__(self, values: Header, scales: Header, block: tuple[int, int]) -> None:
        self.values, self.scales = values, scales
        self.shape = values.shape
        self.block: tuple[int, int] | None = None
        if scales.dtype not in _SCALE_DTYPES:
            self.problem = f"has {scales.name} in {scales.dtype}; {', '.join(_SCALE_DTYPES)} can be read"
            return
        if math.prod(scales.shape) == 1:
            return
        *outer, rows, columns = self.shape
        grid = scales.shape[-2:]
        # Some writers have a grid of their own for some tensors, which then divides them evenly.
        for block_rows, block_columns in (block, (rows // max(grid[0], 1), columns // max(grid[-1], 1))):
            if min(block_rows, block_columns) > 0 and scales.shape == (
                *outer,
                -(-rows // block_rows),
                -(-columns // block_columns),
            ):
                self.block = (block_rows, block_columns)
                return
        self.problem = (
            f"has shape {list(self.shape)} and {scales.name} {list(scales.shape)}: not one factor for each block of "
            f"{block[0]} x {block[1]}"
        )

    def read(self, files: Reader, bounds: Sequence[tuple[int, int]]) -> Tensor:
        values = files.read(self.values, bounds).float()
        if self.block is None:
            return values * files.read(self.scales, [(0, size) for size in self.scales.shape]).float().reshape(())
        outer, inner = bounds[:-2], bounds[-2:]
        blocks = [(first // size, -(-last // size)) for (first, last), size in zip(inner, self.block, strict=True)]
        scales = files.read(self.scales, [*outer, *blocks]).float()
        for dim, size, (first, last), (block, _) in zip((-2, -1), self.block, inner, blocks, strict=True):
            scales = scales.repeat_interleave(size, dim).narrow(dim, first - block * size, last - first)
        return values.mul_(scales)


class _MXFP4(Stored):
    """Halves of bytes, looked up, times the power of two of their group."""

    dtype = "BF16"

    def __init__(self, blocks: Header, scales: Header) -> None:
        self.blocks, self.scales = blocks, scales
        self.shape = ()
        if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, _MXFP4_GROUP // 2):
            self.problem = (
                f"has {blocks.name} {list(blocks.shape)} and {scales.name} {list(scales.shape)}, not [E, B, A/32, 16] "
                "and [E, B, A/32]"
            )
            return
        experts, columns, groups, _ = blocks.shape
        self.shape = (experts, groups * _MXFP4_GROUP, columns)

    def read(self, files: Reader, bounds: Sequence[tuple[int, int]]) -> Tensor:
        experts, (first, last), columns = bounds
        groups = (first // _MXFP4_GROUP, -(-last // _MXFP4_GROUP))
        blocks = files.read(self.blocks, [experts, columns, groups, (0, _MXFP4_GROUP // 2)])
        exponents = files.read(self.scales, [experts, columns, groups]).int() - 127
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=blocks.device)
        halves = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
        values = torch.ldexp(halves, exponents[..., None]).flatten(-2)
        return values.narrow(-1, first - groups[0] * _MXFP4_GROUP, last - first).mT


def stored_tensors(headers: Mapping[str, Header], block: tuple[int, int] = _DEFAULT_BLOCK) -> dict[str, Stored]:
    """The tensors that `headers` stand for: a quantised one and its scales are one.

    Args:
        headers: by name.
        block: rows and columns that have an FP8 factor in common.
    """
    tensors: dict[str, Stored] = {}
    for name, header in headers.items():
        if header.dtype == "F8_E4M3" and f"{name}{_SCALE}" in headers and len(header.shape) > 1:
            tensors[name] = _BlockFP8(header, headers[f"{name}{_SCALE}"], block)
        elif name.endswith(_SCALE) and _is(headers, name.removesuffix(_SCALE), "F8_E4M3"):
            continue
        elif name.endswith(_BLOCKS) and _is(headers, scales := name.removesuffix(_BLOCKS) + _SCALES, "U8"):
            tensors[name.removesuffix(_BLOCKS)] = _MXFP4(header, headers[scales])
        elif name.endswith(_SCALES) and _is(headers, name.removesuffix(_SCALES) + _BLOCKS, "U8"):
            continue
        else:
            tensors[name] = _Plain(header)
    return tensors


def _is(headers: Mapping[str, Header], name: str, dtype: str) -> bool:
    return name in headers and headers[name].dtype == dtype


def block_size(folder: Path) -> tuple[int, int]:
    """Of the FP8 weights in `folder`, as its config.json says; of one that cannot be read, others complain."""
    try:
        rows, columns = json.loads((folder / "config.json").read_text())["quantization_config"]["weight_block_size"]
    except (OSError, ValueError, LookupError, TypeError):
        return _DEFAULT_BLOCK
    return (rows, columns) if type(rows) is int and type(columns) is int and min(rows, columns) > 0 else _DEFAULT_BLOCK
