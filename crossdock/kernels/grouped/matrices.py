"""The slots' matrices as kernels load them: by blocks, whichever way they lie in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from crossdock.kernels.runtime import ALIGNMENT_BYTES, blocks_of, jit, tl

__all__ = ["SlotMatrices", "load_block"]


class SlotMatrices(NamedTuple):
    """`S` matrices `[C, D]` that rows are multiplied by.

    Attributes:
        stored: `[S, C, D]`, or `[S, D, C]` where `transposed`, contiguous.
        transposed: whether columns lie together in memory.
    """

    stored: Tensor
    transposed: bool

    @classmethod
    def of(cls, matrices: Tensor) -> SlotMatrices:
        """Of `[S, C, D]` with rows or columns together in memory; anything else is copied.

        So are matrices that do not begin at a multiple of 16 bytes, as a part of a flat buffer may: a descriptor
        cannot tell where they are.
        """
        transposed = matrices.stride(-1) != 1 and matrices.mT.is_contiguous()
        stored = matrices.mT if transposed else matrices.contiguous()
        return cls(stored.clone() if stored.data_ptr() % ALIGNMENT_BYTES else stored, transposed)

    @property
    def mT(self) -> SlotMatrices:
        """Each matrix the other way round; nothing moves."""
        return SlotMatrices(self.stored, not self.transposed)

    @property
    def matrices(self) -> Tensor:
        """`[S, C, D]`."""
        return self.stored.mT if self.transposed else self.stored

    @property
    def columns(self) -> int:
        """`D`."""
        return self.stored.shape[1 if self.transposed else 2]

    def blocks(self, depth: int, columns: int) -> Any:
        """The descriptor that `load_block` takes."""
        return blocks_of(self.stored, [1, columns, depth] if self.transposed else [1, depth, columns])


@jit
def load_block(blocks, slot, row, column, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """`[DEPTH, COLUMNS]` of a slot's matrix from `row`, `column` on; 0 outside of it."""
    if TRANSPOSED:
        return blocks.load([slot, column, row]).reshape(COLUMNS, DEPTH).T
    else:
        return blocks.load([slot, row, column]).reshape(DEPTH, COLUMNS)
