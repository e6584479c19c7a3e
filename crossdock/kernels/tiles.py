"""Tiles of the grouped kernels: which block of a product one program computes at a time, and how.

What is fastest depends on the GPU and on how many rows a slot has. `default_tiles` is safe everywhere; a `TileTable`
holds what was measured for one shape (`crossdock tune`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

__all__ = ["KERNELS", "ROW_BUCKETS", "TileTable", "Tiles", "bucket_of", "candidates", "default_tiles"]

KERNELS = ("up", "down", "down_grad", "up_grad", "up_weight_grad", "down_weight_grad")
"""The products of an expert, forward and backward, in the order in which they run."""
ROW_BUCKETS = (16, 64, 256, 1024, 4096)
"""Rows per slot, on average, that tiles are chosen for; more than the last is the last."""

_WEIGHT_GRADS = ("up_weight_grad", "down_weight_grad")


class Tiles(NamedTuple):
    """A program's block.

    Attributes:
        rows, columns: of the output; both 16 or more, powers of two. The up projection of gated experts computes two
            such blocks, a gate's and an up half's.
        depth: values of the reduction per step, a power of two, 16 or more.
        num_warps: of 32 threads each, that compute it.
        num_stages: steps whose operands are on their way at once.
        flatten: 1 where a program begins to load its next block while it stores one; else 0. Products with rows alone.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    flatten: int = 0

    @property
    def programs_per_sm(self) -> int:
        """How many are resident on one multiprocessor: registers of the accumulators allow two of the smaller ones."""
        return 1 if self.rows * self.columns >= 128 * 128 else 2

    def fitted(self, columns: int, depth: int, rows: int | None = None) -> Tiles:
        """With no more columns and depth, and where told rows, than a product of that size has."""
        return self._replace(
            rows=self.rows if rows is None else min(self.rows, _power(rows)),
            columns=min(self.columns, _power(columns)),
            depth=min(self.depth, _power(depth)),
        )


class TileTable(Mapping[tuple[str, int], Tiles]):
    """Tiles by kernel (of `KERNELS`) and bucket (of `ROW_BUCKETS`), for one shape on one device.

    Args:
        tiles: not for all kernels and buckets: the rest is `default_tiles`.

    Raises:
        ValueError: for a kernel, a bucket or tiles that there are none of.
    """

    def __init__(self, tiles: Mapping[tuple[str, int], Tiles]) -> None:
        for (kernel, bucket), own in tiles.items():
            if kernel not in KERNELS:
                raise ValueError(f"tiles for kernel {kernel!r}: there is none; valid: {', '.join(KERNELS)}")
            if bucket not in ROW_BUCKETS:
                raise ValueError(f"tiles of {kernel} for {bucket} rows per slot: must be one of {ROW_BUCKETS}")
            for name, value, least in zip(Tiles._fields, own, (16, 16, 16, 1, 1, 0), strict=True):
                if type(value) is not int or value < least or (name != "num_stages" and value & (value - 1)):
                    raise ValueError(f"tiles of {kernel} for {bucket} rows per slot: {name} = {value!r} cannot be")
        self._tiles = dict(tiles)

    def __getitem__(self, key: tuple[str, int]) -> Tiles:
        return self._tiles[key]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._tiles)

    def __len__(self) -> int:
        return len(self._tiles)

    def choose(self, kernel: str, rows_per_slot: float, itemsize: int) -> Tiles:
        """The table's for so many rows, or the default ones."""
        return self._tiles.get((kernel, bucket_of(rows_per_slot))) or default_tiles(kernel, rows_per_slot, itemsize)

    def to_ints(self) -> tuple[int, ...]:
        """As an operator's argument: eight numbers for each kernel and bucket."""
        return tuple(
            value
            for (kernel, bucket), tiles in self._tiles.items()
            for value in (KERNELS.index(kernel), bucket, *tiles)
        )

    @classmethod
    @cache
    def from_ints(cls, ints: tuple[int, ...]) -> TileTable:
        """What `to_ints` gave."""
        entries = (ints[first : first + 8] for first in range(0, len(ints), 8))
        return cls({(KERNELS[kernel], bucket): Tiles(*tiles) for kernel, bucket, *tiles in entries})

    def to_json(self) -> dict[str, dict[str, list[int]]]:
        """`{kernel: {bucket: [rows, columns, depth, num_warps, num_stages, flatten]}}`."""
        table: dict[str, dict[str, list[int]]] = {}
        for (kernel, bucket), tiles in self._tiles.items():
            table.setdefault(kernel, {})[str(bucket)] = list(tiles)
        return table

    @classmethod
    def from_json(cls, table: Any) -> TileTable:
        """What `to_json` gave.

        Raises:
            ValueError: where it is something else.
        """
        try:
            return cls(
                {
                    (kernel, int(bucket)): Tiles(*tiles)
                    for kernel, buckets in table.items()
                    for bucket, tiles in buckets.items()
                }
            )
        except (AttributeError, TypeError) as error:
            raise ValueError(f"no table of tiles: {error}") from None


def bucket_of(rows_per_slot: float) -> int:
    """The first of `ROW_BUCKETS` that holds so many rows, or the last."""
    return next((bucket for bucket in ROW_BUCKETS if rows_per_slot <= bucket), ROW_BUCKETS[-1])


def default_tiles(kernel: str, rows_per_slot: float, itemsize: int) -> Tiles:
    """Tiles that fit a Hopper GPU without spilling registers; not measured.

    Args:
        kernel: of `KERNELS`.
        rows_per_slot: on average.
        itemsize: bytes of a value: 2, or 4, whose products go without tensor cores.
    """
    if itemsize > 2:
        return Tiles(min(64, bucket_of(rows_per_slot)), 64, 16, 8, 2)
    return candidates(kernel, rows_per_slot)[0]


def candidates(kernel: str, rows_per_slot: float) -> tuple[Tiles, ...]:
    """What is worth measuring for 2-byte values, the default first."""
    bucket = bucket_of(rows_per_slot)
    if kernel in _WEIGHT_GRADS:
        depth = min(bucket, 64)
        return (
            # Rows are found by an index, whose loading is a stage of its own.
            Tiles(128, 256, depth, 8, 4),
            Tiles(128, 256, depth, 8, 3),
            Tiles(256, 128, depth, 8, 4),
            Tiles(128, 128, depth, 8, 4),
            Tiles(128, 128, depth, 4, 4),
            Tiles(128, 256, min(depth, 32), 8, 5),
        )
    if bucket == 16:
        return tuple(Tiles(16, columns, depth, 4, 4) for columns, depth in ((128, 64), (64, 128), (128, 128), (64, 64)))
    if bucket == 64:
        return (
            Tiles(64, 128, 64, 4, 3),
            Tiles(64, 64, 64, 4, 4),
            Tiles(64, 64, 128, 4, 3),
            Tiles(32, 128, 64, 4, 4),
            Tiles(64, 128, 64, 8, 3),
        )
    if kernel in ("up", "down_grad"):
        return (
            Tiles(128, 128, 64, 8, 3),
            Tiles(128, 128, 64, 8, 3, 1),
            Tiles(128, 128, 64, 8, 4),
            Tiles(128, 64, 64, 8, 4),
            Tiles(64, 128, 64, 4, 3),
            Tiles(64, 128, 32, 4, 4),
        )
    return (
        Tiles(128, 256, 64, 8, 3),
        Tiles(128, 256, 64, 8, 3, 1),
        Tiles(128, 256, 64, 8, 4),
        Tiles(128, 128, 64, 8, 4),
        Tiles(128, 128, 64, 4, 4),
        Tiles(64, 256, 64, 4, 3),
    )


def _power(size: int) -> int:
    """The least power of two that is `size` or more, at least 16."""
    return 1 << max(4, (size - 1).bit_length())
