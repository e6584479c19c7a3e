"""Matrices that are sharded over ranks: each one whole on one of them for a while, and back in pieces.

The ranks that share a parameter's matrices are those along the mesh dimensions that shard one of its last two
dimensions. What comes before these (experts' slots) may be sharded as well: that only makes matrices fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from crossdock.parallel.shards import local_part

__all__ = ["Run", "ShardedMatrices", "Stage", "gather_matrices", "runs_within", "scatter_matrices"]

Coordinates = tuple[int, ...]
Indices = Sequence[int]


class Stage(NamedTuple):
    """One mesh dimension of those that share matrices: an exchange of its own, so that no further group is needed.

    Attributes:
        group: its ranks.
        size: how many.
        rank: which of them this one is.
    """

    group: dist.ProcessGroup
    size: int
    rank: int


class ShardedMatrices:
    """Where the pieces of a parameter's matrices are.

    Args:
        parameter: `[..., A, B]`, of any layout that shards and replicates.

    Attributes:
        count: matrices of which this rank has a piece, the same on all ranks that share them.
        shape: `A, B` of a whole one.
        stages: dimensions over which they are sharded, the innermost first; none where this rank has them whole.
        pieces: by the coordinates in `stages`, which rows and which columns that rank has.
        own: this rank's coordinates.

    Raises:
        ValueError: for a vector, or a layout that holds partial sums or is not known.
    """

    def __init__(self, parameter: Tensor) -> None:
        if parameter.ndim < 2:
            raise ValueError(f"a parameter of shape {list(parameter.shape)} holds no matrix")
        self.shape = parameter.shape[-2], parameter.shape[-1]
        local = local_part(parameter)
        self.count = math.prod(local.shape[:-2])
        self.stages: tuple[Stage, ...] = ()
        self.pieces: dict[Coordinates, tuple[Indices, Indices]] = {(): (range(self.shape[0]), range(self.shape[1]))}
        if isinstance(parameter, DTensor):
            self._read_layout(parameter)
        self.own = tuple(stage.rank for stage in self.stages)
        if self.piece_shape(self.own) != local.shape[-2:]:
            layout = f"{parameter.placements}" if isinstance(parameter, DTensor) else "a tensor"
            raise ValueError(f"matrices {list(parameter.shape)} are laid out in a way that is not known: {layout}")

    def _read_layout(self, parameter: DTensor) -> None:
        mesh, first = parameter.device_mesh, parameter.ndim - 2
        for index, placement in enumerate(parameter.placements):
            if isinstance(placement, Partial):
                raise ValueError(f"a parameter of placements {parameter.placements} holds partial sums")
            # In a newer torch a strided shard is no `Shard`.
            if not isinstance(placement, Shard | _StridedShard) or mesh.size(index) == 1:
                continue
            dim = placement.dim % parameter.ndim - first
            if dim < 0:
                continue
            factor = placement.split_factor if isinstance(placement, _StridedShard) else 1
            self.stages = (Stage(mesh.get_group(index), mesh.size(index), mesh.get_local_rank(index)), *self.stages)
            self.pieces = {
                (rank, *outer): (part, columns) if dim == 0 else (rows, part)
                for outer, (rows, columns) in self.pieces.items()
                for rank, part in enumerate(_split((rows, columns)[dim], mesh.size(index), int(factor)))
            }

    def piece_shape(self, coordinates: Coordinates) -> tuple[int, int]:
        rows, columns = self.pieces[coordinates]
        return len(rows), len(columns)

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's pieces `[count, a, b]`, a view: of the parameter, or a tensor that is laid out as it is."""
        return local_part(tensor).view(self.count, *self.piece_shape(self.own))

    @property
    def sharing(self) -> int:
        """How many ranks share these matrices."""
        return math.prod(stage.size for stage in self.stages)


class Run(NamedTuple):
    """Consecutive matrices of a parameter, and who gets each: they are dealt out in turn to the ranks that share them.

    Attributes:
        matrices: of the parameter.
        start, count: which of them.
        turn: of the first one; the rank at coordinates `c` gets turns `c[0] + c[1] * size[0] + ...` of every round.
    """

    matrices: ShardedMatrices
    start: int
    count: int
    turn: int


def runs_within(all_matrices: Sequence[ShardedMatrices], num_elements: int) -> Iterator[list[Run]]:
    """Divide matrices into exchanges that bring each rank at most `num_elements`, or one matrix.

    Args:
        all_matrices: of the same `stages`.
        num_elements: of whole matrices.
    """
    runs: list[Run] = []
    turn = used = 0
    for matrices in all_matrices:
        size, start = math.prod(matrices.shape), 0
        while start < matrices.count:
            room = (num_elements - used) // max(size, 1)
            if room <= 0 and runs:
                yield runs
                runs, used = [], 0
                continue
            per_rank = max(room, 1)
            count = min(matrices.count - start, per_rank * matrices.sharing)
            runs.append(Run(matrices, start, count, turn))
            used += -(-count // matrices.sharing) * size
            start, turn = start + count, turn + count
    if runs:
        yield runs


def gather_matrices(runs: Sequence[Run], pieces: Sequence[Tensor]) -> list[Tensor]:
    """Of each run, the matrices that are this rank's turn, `[N, A, B]`.

    One exchange per stage. Collective for all ranks that share matrices.

    Args:
        runs: of one exchange, see `runs_within`; of the same `stages`.
        pieces: of each run, this rank's piece of every matrix `[count, a, b]`, of one dtype.
    """
    held: list[dict[Coordinates, Tensor]] = [{(): piece} for piece in pieces]
    deal = [(run.turn, run.count) for run in runs]
    for index, stage in enumerate(runs[0].matrices.stages):
        sent = [
            [each[_turns(rank, stage.size, turn, count)] for rank in range(stage.size)]
            for pieces_held, (turn, count) in zip(held, deal, strict=True)
            for each in pieces_held.values()
        ]
        deal = [_next_deal(stage, turn, count) for turn, count in deal]
        shapes = [
            [
                (count, *run.matrices.piece_shape((*seen, rank, *run.matrices.own[index + 1 :])))
                for rank in range(stage.size)
            ]
            for run, pieces_held, (_, count) in zip(runs, held, deal, strict=True)
            for seen in pieces_held
        ]
        received = iter(_exchange(stage, sent, shapes))
        held = [
            {(*seen, rank): piece for seen in pieces_held for rank, piece in enumerate(next(received))}
            for pieces_held in held
        ]
    return [_assembled(run.matrices, pieces_held) for run, pieces_held in zip(runs, held, strict=True)]


def scatter_matrices(runs: Sequence[Run], whole: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of `gather_matrices`: `whole [N, A, B]` that this rank has made, to its pieces `[count, a, b]`."""
    stages = runs[0].matrices.stages
    held = [
        {coordinates: _cut(matrices, piece) for coordinates, piece in run.matrices.pieces.items()}
        for run, matrices in zip(runs, whole, strict=True)
    ]
    deals = [[(run.turn, run.count) for run in runs]]
    for stage in stages:
        deals.append([_next_deal(stage, turn, count) for turn, count in deals[-1]])
    for index, stage in reversed(list(enumerate(stages))):
        own = slice(index, None)
        seen_before = [list(dict.fromkeys(each[:index] for each in pieces_held)) for pieces_held in held]
        sent = [
            [pieces_held[(*seen, rank)] for rank in range(stage.size)]
            for pieces_held, before in zip(held, seen_before, strict=True)
            for seen in before
        ]
        shapes = [
            [
                (_num_turns(rank, stage.size, turn, count), *run.matrices.piece_shape((*seen, *run.matrices.own[own])))
                for rank in range(stage.size)
            ]
            for run, before, (turn, count) in zip(runs, seen_before, deals[index], strict=True)
            for seen in before
        ]
        received = iter(_exchange(stage, sent, shapes))
        held = [
            {seen: _merged(next(received), stage.size, turn, count) for seen in before}
            for before, (turn, count) in zip(seen_before, deals[index], strict=True)
        ]
    return [pieces_held[()] for pieces_held in held]


def _split(indices: Indices, size: int, factor: int) -> list[Indices]:
    """Of the rows (or columns) `indices`, those of each of `size` ranks; see torch's `_StridedShard` for `factor`."""
    if factor == 1:
        return _chunks(indices, size)
    split = [_chunks(part, size) for part in _chunks(indices, factor)]
    return [_as_range([index for parts in split for index in parts[rank]]) for rank in range(size)]


def _as_range(indices: list[int]) -> Indices:
    """`indices` as a range where they have no gap."""
    first = indices[0] if indices else 0
    without_gap = range(first, first + len(indices))
    return without_gap if indices == list(without_gap) else indices


def _chunks(indices: Indices, num: int) -> list[Indices]:
    """As `torch.chunk`, with empty ones at the end."""
    size = -(-len(indices) // num)
    return [indices[rank * size : (rank + 1) * size] for rank in range(num)]


def _turns(rank: int, size: int, turn: int, count: int) -> slice:
    """Of `count` matrices, the first of them of `turn`, those that a rank of a stage gets."""
    return slice((rank - turn) % size, count, size)


def _num_turns(rank: int, size: int, turn: int, count: int) -> int:
    return len(range(count)[_turns(rank, size, turn, count)])


def _next_deal(stage: Stage, turn: int, count: int) -> tuple[int, int]:
    """Turn of the first, and number, of those that this rank has after a stage."""
    first = turn + (stage.rank - turn) % stage.size
    return first // stage.size, _num_turns(stage.rank, stage.size, turn, count)


def _exchange(stage: Stage, sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]) -> list[list[Tensor]]:
    """Of each entry, send one tensor to every rank of a stage; get theirs, of the `shapes` that are known."""
    by_rank = [[entry[rank].flatten() for entry in sent] for rank in range(stage.size)]
    sizes = [[math.prod(entry[rank]) for entry in shapes] for rank in range(stage.size)]
    message = torch.cat([part for parts in by_rank for part in parts])
    received = message.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(
        received,
        message,
        [sum(own) for own in sizes],
        [sum(part.numel() for part in parts) for parts in by_rank],
        group=stage.group,
    )
    parts = [own.split(split) for own, split in zip(received.split([sum(own) for own in sizes]), sizes, strict=True)]
    return [
        [parts[rank][entry].view(shapes[entry][rank]) for rank in range(stage.size)] for entry in range(len(shapes))
    ]


def _assembled(matrices: ShardedMatrices, pieces: dict[Coordinates, Tensor]) -> Tensor:
    if len(pieces) == 1:
        return pieces[()]
    first = next(iter(pieces.values()))
    whole = first.new_empty(len(first), *matrices.shape)
    for coordinates, piece in pieces.items():
        rows, columns = matrices.pieces[coordinates]
        whole[_at(rows, columns)] = piece
    return whole


def _cut(whole: Tensor, piece: tuple[Indices, Indices]) -> Tensor:
    return whole[_at(*piece)]


def _at(rows: Indices, columns: Indices) -> tuple:
    """What indexes these rows and columns of `[N, A, B]`: a view where both are without a gap."""
    if isinstance(rows, range) and isinstance(columns, range):
        return slice(None), slice(rows.start, rows.stop), slice(columns.start, columns.stop)
    return slice(None), torch.tensor(rows)[:, None], torch.tensor(columns)


def _merged(received: Sequence[Tensor], size: int, turn: int, count: int) -> Tensor:
    merged = received[0].new_empty(count, *received[0].shape[1:])
    for rank, part in enumerate(received):
        merged[_turns(rank, size, turn, count)] = part
    return merged
