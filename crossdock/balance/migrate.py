"""Experts move between ranks: rows of parameters, and what the optimizer keeps of them, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crossdock.comm import Splits, exchange
from crossdock.parallel import local_part
from crossdock.placement import EMPTY, Placement
from crossdock.routed_experts import RoutedExperts

__all__ = ["Migration", "MigrationError", "migrate", "primaries_moved"]

_CHUNK_BYTES = 64 * 2**20  # What a rank sends at a time; as much arrives, or some of it less or more.


class MigrationError(RuntimeError):
    """Experts have moved in part; this process's model is of no use any more, and its checkpoints are whole."""


class Migration(NamedTuple):
    """What a migration has done.

    Attributes:
        experts: whose primaries are on other ranks now, of all layers.
        bytes: that this rank has sent to others.
        seconds: it took.
    """

    experts: int = 0
    bytes: int = 0
    seconds: float = 0.0


class _Piece(NamedTuple):
    """Some columns of the rows of one tensor `[P/R, C]` that move: where they leave from and where they arrive."""

    columns: Tensor
    leaving: Sequence[Sequence[int]]
    arriving: Sequence[Sequence[int]]


@torch.no_grad()
def migrate(
    moves: Mapping[RoutedExperts, Placement],
    optimizer: torch.optim.Optimizer | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
) -> Migration:
    """Move the experts of each layer to where its new placement has them; the caller puts the placements in force.

    Between steps, when gradients have been used. A batched exchange moves some columns of all rows at a time, so that
    no row is overwritten before it has left. Collective among the ranks that hold the experts.

    Args:
        moves: for each layer, a placement of as many rows.
        optimizer: its states of a parameter's shape move along.
        chunk_bytes: what one exchange takes about.

    Raises:
        MigrationError: where the exchange broke off, as it does when a rank is gone.
    """
    started = time.perf_counter()
    experts = sum(primaries_moved(layer.placement, placement) for layer, placement in moves.items())
    sent = 0
    try:
        for layer, batch in _batches(moves, optimizer, chunk_bytes):
            sent += _exchange(layer, batch)
        for layer, placement in moves.items():
            # What has left a row would go on being trained there, and counted in norms.
            empty = [row for row, expert in enumerate(placement.experts_on(layer.ep_rank)) if expert == EMPTY]
            for rows in _tensors(layer, optimizer) if empty else ():
                rows[empty] = 0
    except RuntimeError as error:
        raise MigrationError(
            "experts were on their way to other ranks when their exchange broke off, so that this model is not whole: "
            f"start again from the last checkpoint. {error}"
        ) from error
    return Migration(experts, sent, time.perf_counter() - started)


def primaries_moved(old: Placement, new: Placement) -> int:
    """Experts whose primary changes its rank."""
    pairs = zip(old.expert_to_row, new.expert_to_row, strict=True)
    return sum(before // old.rows_per_rank != after // new.rows_per_rank for before, after in pairs)


def _batches(
    moves: Mapping[RoutedExperts, Placement], optimizer: torch.optim.Optimizer | None, chunk_bytes: int
) -> Iterator[tuple[RoutedExperts, list[_Piece]]]:
    """Pieces of about `chunk_bytes` in all; the same ones on all ranks, whatever each of them has to send."""
    batch: list[_Piece] = []
    size, last = 0, None
    for layer, placement in moves.items():
        leaving, arriving = _routes(layer, placement)
        for rows in _tensors(layer, optimizer):
            # As if every row of a rank moved: other ranks must find the same pieces.
            step = max(1, chunk_bytes // (len(rows) * rows.element_size()))
            for start in range(0, rows.shape[1], step):
                columns = rows[:, start : start + step]
                batch.append(_Piece(columns, leaving, arriving))
                size += len(rows) * min(step, rows.shape[1] - start) * rows.element_size()
                last = layer
                if size >= chunk_bytes:
                    yield layer, batch
                    batch, size = [], 0
    if batch and last is not None:
        yield last, batch


def _routes(layer: RoutedExperts, placement: Placement) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of this rank that leave for each rank, and that arrive from each: in one order at both ends, by expert."""
    leaving: list[list[int]] = [[] for _ in range(placement.num_ranks)]
    arriving: list[list[int]] = [[] for _ in range(placement.num_ranks)]
    for before, after in zip(layer.placement.expert_to_row, placement.expert_to_row, strict=True):
        if before == after:
            continue
        (source, row), (target, place) = divmod(before, placement.rows_per_rank), divmod(after, placement.rows_per_rank)
        if source == layer.ep_rank:
            leaving[target].append(row)
        if target == layer.ep_rank:
            arriving[source].append(place)
    return leaving, arriving


def _tensors(layer: RoutedExperts, optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """What this rank holds of the layer's experts, each `[P/R, C]`: parameters, and the optimizer's states of them."""
    for parameter in layer.experts.slot_parameters().values():
        states = [] if optimizer is None else optimizer.state.get(parameter, {}).values()
        for whole in (parameter, *states):
            if isinstance(whole, Tensor) and whole.shape == parameter.shape:
                rows = local_part(whole.detach())
                yield rows.view(len(rows), -1)


def _exchange(layer: RoutedExperts, batch: Sequence[_Piece]) -> int:
    """Move all pieces at once; returns the bytes that this rank sent to others."""
    assert layer.ep_group is not None
    device = layer.load.tokens.device  # A group of GPUs moves nothing between hosts, where offloaded rows are.
    ranks = range(layer.ep_world_size)
    sends = [[piece.columns[list(piece.leaving[rank])] for piece in batch] for rank in ranks]
    send = [sum(part.nbytes for part in parts) for parts in sends]
    receive = [sum(len(piece.arriving[rank]) * piece.columns[0].nbytes for piece in batch) for rank in ranks]
    parts = [part.reshape(-1).view(torch.uint8) for parts in sends for part in parts]
    packed = torch.cat(parts).to(device)
    arrived = exchange(packed, Splits(send, receive), layer.ep_group.group_name).wait()
    start = 0
    for rank in ranks:
        for piece in batch:
            places = list(piece.arriving[rank])
            end = start + len(places) * piece.columns[0].nbytes
            # A view as a wider type needs storage that starts at a multiple of its size.
            values = arrived[start:end].clone().view(piece.columns.dtype)
            piece.columns[places] = values.view(len(places), piece.columns.shape[1]).to(piece.columns.device)
            start = end
    return sum(size for rank, size in enumerate(send) if rank != layer.ep_rank)
