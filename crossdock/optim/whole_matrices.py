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

from crossdock.parallel import local_part

__all__ = ["Deal", "Portion", "ShardedMatrices", "Stage", "exchanges", "gather_matrices", "scatter_matrices"]

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


class Deal(NamedTuple):
    """Consecutive matrices, dealt out in turn to the ranks that share them.

    Turn `t` is that of the rank `t % size` of the first stage and of `t // size % size'` of the second, and so on.

    Attributes:
        turn: of the first matrix.
        num: how many there are.
    """

    turn: int
    num: int

    def to(self, rank: int, size: int) -> slice:
        """Those that `rank` of a stage gets."""
        return slice((rank - self.turn) % size, self.num, size)

    def num_to(self, rank: int, size: int) -> int:
        return len(range(self.num)[self.to(rank, size)])

    def after(self, stage: Stage) -> Deal:
        """How those that this rank gets are dealt out in the next stage."""
        first = self.turn + (stage.rank - self.turn) % stage.size
        return Deal(first // stage.size, self.num_to(stage.rank, stage.size))


class Portion(NamedTuple):
    """Of a parameter's matrices, those from `start` on that `deal` deals out."""

    matrices: ShardedMatrices
    start: int
    deal: Deal

    @property
    def part(self) -> slice:
        return slice(self.start, self.start + self.deal.num)


def exchanges(all_matrices: Sequence[ShardedMatrices], num_elements: int) -> Iterator[list[Portion]]:
    """Divide matrices into exchanges that bring each rank at most `num_elements`, or one matrix.

    Args:
        all_matrices: of the same `stages`.
        num_elements: of whole matrices.
    """
    portions: list[Portion] = []
    turn = used = 0
    for matrices in all_matrices:
        size, start = math.prod(matrices.shape), 0
        while start < matrices.count:
            room = (num_elements - used) // max(size, 1)
            if room <= 0 and portions:
                yield portions
                portions, used = [], 0
                continue
            num = min(matrices.count - start, max(room, 1) * matrices.sharing)
            portions.append(Portion(matrices, start, Deal(turn, num)))
            used += -(-num // matrices.sharing) * size
            start, turn = start + num, turn + num
    if portions:
        yield portions


def gather_matrices(portions: Sequence[Portion], pieces: Sequence[Tensor]) -> list[Tensor]:
    """Of each portion, the matrices that are this rank's turn, `[N, A, B]`.

    One all-to-all per stage. Collective for all ranks that share matrices.

    Args:
        portions: of one exchange, see `exchanges`.
        pieces: of each portion, this rank's piece of every matrix `[num, a, b]`, of one dtype.
    """
    held: list[dict[Coordinates, Tensor]] = [{(): piece} for piece in pieces]
    deals = [portion.deal for portion in portions]
    for index, stage in enumerate(portions[0].matrices.stages):
        ranks, sent, shapes = range(stage.size), [], []
        for portion, pieces_held, deal in zip(portions, held, deals, strict=True):
            matrices, later = portion.matrices, portion.matrices.own[index + 1 :]
            num = deal.after(stage).num
            for seen, piece in pieces_held.items():
                sent.append([piece[deal.to(rank, stage.size)] for rank in ranks])
                shapes.append([(num, *matrices.piece_shape((*seen, rank, *later))) for rank in ranks])
        received = iter(_exchange(stage, sent, shapes))
        held = [
            {(*seen, rank): piece for seen in pieces_held for rank, piece in enumerate(next(received))}
            for pieces_held in held
        ]
        deals = [deal.after(stage) for deal in deals]
    return [_assembled(portion.matrices, pieces_held) for portion, pieces_held in zip(portions, held, strict=True)]


def scatter_matrices(portions: Sequence[Portion], whole: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of `gather_matrices`: `whole [N, A, B]` that this rank has made, to its pieces `[num, a, b]`."""
    held = [
        {coordinates: matrices[_at(*piece)] for coordinates, piece in portion.matrices.pieces.items()}
        for portion, matrices in zip(portions, whole, strict=True)
    ]
    stages = portions[0].matrices.stages
    before = [[portion.deal for portion in portions]]
    for stage in stages[:-1]:
        before.append([deal.after(stage) for deal in before[-1]])
    for index in reversed(range(len(stages))):
        stage, deals = stages[index], before[index]
        ranks, sent, shapes = range(stage.size), [], []
        all_seen = [list(dict.fromkeys(coordinates[:index] for coordinates in pieces_held)) for pieces_held in held]
        for portion, pieces_held, deal, each_seen in zip(portions, held, deals, all_seen, strict=True):
            matrices, own = portion.matrices, portion.matrices.own[index:]
            for seen in each_seen:
                sent.append([pieces_held[(*seen, rank)] for rank in ranks])
                shape = matrices.piece_shape((*seen, *own))
                shapes.append([(deal.num_to(rank, stage.size), *shape) for rank in ranks])
        received = iter(_exchange(stage, sent, shapes))
        held = [
            {seen: _merged(deal, next(received)) for seen in each_seen}
            for deal, each_seen in zip(deals, all_seen, strict=True)
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


def _at(rows: Indices, columns: Indices) -> tuple:
    """What indexes these rows and columns of `[N, A, B]`: a view where both are without a gap."""
    if isinstance(rows, range) and isinstance(columns, range):
        return slice(None), slice(rows.start, rows.stop), slice(columns.start, columns.stop)
    return slice(None), torch.tensor(rows)[:, None], torch.tensor(columns)


def _merged(deal: Deal, parts: Sequence[Tensor]) -> Tensor:
    """What came back from each rank of a stage, in the order of before."""
    merged = parts[0].new_empty(deal.num, *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        merged[deal.to(rank, len(parts))] = part
    return merged
