"""What each data-parallel rank sees at each step, in training and in evaluation.

`TokenBatches` is a pure function of the number of samples before: to resume a run, on the same or another number of
ranks, that number is all that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from crossdock.data.config import DataError, Packing
from crossdock.data.packing import Batch, Rows, pack, read_rows
from crossdock.data.tokens import TokenFile

__all__ = ["MIXTURE_BLOCK", "TokenBatches", "evaluation_batches", "mixture_quotas"]

# Samples within which a weighted mixture has its shares exactly.
MIXTURE_BLOCK: Final = 1000
"""Samples in a row among which the shares of a mixture hold exactly."""

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """The samples of every step, for one data-parallel rank.

    A sample is a row of S = `seq_len` tokens, by `packing` (`StreamRows`, `DocumentRows`). A step takes G =
    `global_batch_size` samples of an endless sequence; row j of micro-batch m of rank r is number `m*B*D + r*B + j` of
    these, B = `local_batch_size` and D = `dp_degree`: the same samples for every B and D.

    Without `weights` the sequence is one epoch after another of the rows of all sources together, every row once, in an
    order that is a function of `seed` and the epoch alone. With `weights`, one for each source, every `MIXTURE_BLOCK`
    samples hold each source's share exactly (`mixture_quotas`), in an order that is a function of `seed` and the block;
    within each source epochs follow each other as above.

    Raises DataError for an argument out of range, naming it, and for a source without a row.
    """

    tokens: Sequence[TokenFile]
    seq_len: int
    global_batch_size: int
    local_batch_size: int
    dp_rank: int
    dp_degree: int
    seed: int
    weights: Sequence[float] = ()
    packing: Packing = "stream"
    attend_within_documents: bool = False
    _rows: list[Rows] = field(init=False, repr=False)
    _quotas: tuple[int, ...] = field(init=False, repr=False)
    _order_of_epoch: dict[int, tuple[int, _Array]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        _check_layout(self.seq_len, self.local_batch_size, self.dp_rank, self.dp_degree)
        for name, bound in {"global_batch_size": 1, "seed": 0}.items():
            if getattr(self, name) < bound:
                raise DataError(f"{name} is {getattr(self, name)}, must be at least {bound}")
        if self.global_batch_size % (rows := self.local_batch_size * self.dp_degree):
            wanted = f"a multiple of local_batch_size * dp_degree, which is {rows}"
            raise DataError(f"global_batch_size is {self.global_batch_size}, must be {wanted}")
        if self.weights and len(self.weights) != len(self.tokens):
            raise DataError(f"weights are {list(self.weights)}, must be one for each of the {len(self.tokens)} sources")
        # Frozen: set past it. One source has all samples, whatever its weight.
        weights = self.weights if len(self.tokens) > 1 else ()
        object.__setattr__(self, "_rows", [pack(file, self.seq_len, self.packing) for file in self.tokens])
        object.__setattr__(self, "_quotas", mixture_quotas(weights) if weights else ())

    @property
    def rows_per_source(self) -> tuple[int, ...]:
        """Rows that each source holds."""
        return tuple(map(len, self._rows))

    def at(self, first_sample: int, group: int = 0, groups: int = 1) -> list[Batch]:
        """The `G / (B*D)` micro-batches of this rank in the step that starts at `first_sample` >= 0 (else DataError).

        The position is a number of samples, not of steps, so that a resumed run may take another global batch. Where
        several groups of `dp_degree` ranks share the step's samples, D is that of all `groups` together, and this rank
        is one of number `group`; G must be a multiple of B*D (else DataError).
        """
        if first_sample < 0:
            raise DataError(f"first_sample is {first_sample}, must be at least 0")
        degree, rank = self.dp_degree * groups, self.dp_degree * group + self.dp_rank
        if self.global_batch_size % (rows := self.local_batch_size * degree):
            shares = f"must be a multiple of {rows} for {groups} groups"
            raise DataError(f"global_batch_size is {self.global_batch_size}, {shares}")
        in_step = np.arange(self.global_batch_size).reshape(-1, degree, self.local_batch_size)
        samples = first_sample + in_step[:, rank]  # [micro-batches, B]
        bounds = np.cumsum([0, *self.rows_per_source])
        rows = self._mixed(samples, bounds) if self._quotas else self._in_epochs(samples, 0, int(bounds[-1]), ())
        sources = np.searchsorted(bounds, rows, side="right") - 1
        return [
            read_rows(
                self._rows,
                of_sources,
                of_rows,
                within_documents=self.attend_within_documents,
                padded=self.packing == "documents",
            )
            for of_sources, of_rows in zip(sources, rows - bounds[sources], strict=True)
        ]

    def _mixed(self, samples: _Array, bounds: _Array) -> _Array:
        """The rows, counted through all sources, of samples of a weighted mixture."""
        rows = np.empty_like(samples)
        blocks, within = np.divmod(samples, MIXTURE_BLOCK)
        by_source = np.repeat(np.arange(len(self._quotas)), self._quotas)
        for block in np.unique(blocks).tolist():
            order = _permutation(MIXTURE_BLOCK, (self.seed, block), (len(self._quotas),))
            here = np.flatnonzero(blocks == block)
            sources = by_source[order]  # Of each place of the block.
            for source, quota in enumerate(self._quotas):
                mine = sources == source
                ranks = np.cumsum(mine) - 1  # How many places of this source come before.
                chosen = here[mine[within.flat[here]]]
                positions = block * quota + ranks[within.flat[chosen]]
                size = len(self._rows[source])
                rows.flat[chosen] = bounds[source] + self._in_epochs(positions, source, size, (source,))
        return rows

    def _in_epochs(self, positions: _Array, pool: int, num_rows: int, key: tuple[int, ...]) -> _Array:
        """The rows at `positions` of the endless sequence of epochs over a pool of rows."""
        epochs, within = np.divmod(positions, num_rows)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            if self._order_of_epoch.get(pool, (-1,))[0] != epoch:
                self._order_of_epoch[pool] = (epoch, _permutation(num_rows, (self.seed, epoch), key))
            here = epochs == epoch
            rows[here] = self._order_of_epoch[pool][1][within[here]]
        return rows


def mixture_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of `MIXTURE_BLOCK` samples each source has: its share rounded down, and one more for the largest rests.

    Raises DataError for a weight that is not positive and finite, or that comes to no sample at all.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise DataError(f"weights are {list(weights)}, must be positive finite numbers")
    largest = max(weights)  # Divided by first, since the sum of finite numbers may be infinite.
    scaled = np.array([weight / largest for weight in weights])
    shares = MIXTURE_BLOCK * scaled / scaled.sum()
    quotas = np.floor(shares).astype(int)
    by_rest = np.argsort(quotas - shares, kind="stable")
    quotas[by_rest[: MIXTURE_BLOCK - quotas.sum()]] += 1
    if not quotas.all():
        least = f"at least 1/{MIXTURE_BLOCK} of their sum each"
        raise DataError(f"weights are {list(weights)}, must be {least}: raise the smallest or leave its source out")
    return tuple(quotas.tolist())


def evaluation_batches(
    tokens: Sequence[TokenFile],
    *,
    seq_len: int,
    local_batch_size: int,
    dp_rank: int,
    dp_degree: int,
    packing: Packing = "stream",
    attend_within_documents: bool = False,
    max_samples: int | None = None,
) -> Iterator[Batch]:
    """One pass over token files, in order, for one data-parallel rank.

    Every row once, the rest at a file's end too, so that every token is predicted once, save the first of a file (with
    `attend_within_documents` or packing `documents`: of a document, where that is not joined to another), which is
    context alone. Row j of micro-batch m of rank r is number `m*B*D + r*B + j`. All ranks yield the same number of
    micro-batches; rows that there are not any more are padding from end to end. `padding_mask` is always there.

    Args:
        max_samples: evaluate no more than this many rows, spread evenly over all.

    Raises:
        DataError: at the call, for an argument out of range, naming it, and for a file without a row.
    """
    _check_layout(seq_len, local_batch_size, dp_rank, dp_degree)
    if max_samples is not None and max_samples < 1:
        raise DataError(f"max_samples is {max_samples}, must be at least 1")
    sources = [pack(file, seq_len, packing, with_rest=True) for file in tokens]
    bounds = np.cumsum([0, *map(len, sources)])
    total = int(bounds[-1])
    count = total if max_samples is None else min(total, max_samples)
    rows_per_step = local_batch_size * dp_degree

    def batches() -> Iterator[Batch]:
        for step in range(-(-count // rows_per_step)):
            samples = step * rows_per_step + dp_rank * local_batch_size + np.arange(local_batch_size)
            rows = np.minimum(samples, count - 1) * total // count
            source_ids = np.searchsorted(bounds, rows, side="right") - 1
            row_ids = np.where(samples < count, rows - bounds[source_ids], -1)
            yield read_rows(sources, source_ids, row_ids, within_documents=attend_within_documents, padded=True)

    return batches()


def _check_layout(seq_len: int, local_batch_size: int, dp_rank: int, dp_degree: int) -> None:
    least = {"seq_len": (seq_len, 1), "local_batch_size": (local_batch_size, 1)}
    least |= {"dp_degree": (dp_degree, 1), "dp_rank": (dp_rank, 0)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise DataError(f"{name} is {value}, must be at least {bound}")
    if dp_rank >= dp_degree:
        raise DataError(f"dp_rank is {dp_rank}, must be below dp_degree, which is {dp_degree}")


def _permutation(size: int, entropy: tuple[int, int], key: tuple[int, ...]) -> _Array:
    """The numbers below `size` `[size]` in an order of their own for each `entropy` and `key`."""
    # NumPy keeps the raw bits of a generator from release to release, but not what permutation() makes of them.
    random_keys = np.random.PCG64(np.random.SeedSequence(entropy, spawn_key=key)).random_raw(size)
    return np.argsort(random_keys, kind="stable")
