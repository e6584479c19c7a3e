"""A snapshot that is found after a new start: whether it is whole, and what becomes of it on another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from crossdock.checkpoint.dcp_writing import write_shard
from crossdock.checkpoint.folders import CheckpointError, finish, make_room, step_folder
from crossdock.checkpoint.held import Place
from crossdock.checkpoint.memory_files import Manifest, MemoryFiles, views_of_places
from crossdock.comm import raise_together
from crossdock.placement import EMPTY

__all__ = ["RANDOM", "FoundSnapshot", "SnapshotPart", "newest_of_parts", "write_checkpoint"]

RANDOM = "random_state."
"""What names of random states begin with; then come the device and the rank."""


class FoundSnapshot(NamedTuple):
    """A snapshot that is whole across the ranks.

    Attributes:
        step: after which it was taken.
        counters: what is no tensor.
        holders: the rank that can read each saved rank's part now.
        slots: in which slot that is.
        layout: of the run then.
    """

    step: int
    counters: dict[str, Any]
    holders: list[int]
    slots: list[int]
    layout: str


class SnapshotPart(NamedTuple):
    """One rank's part of a snapshot, as a rank that can read it tells of it.

    Attributes:
        holder: that rank.
        slot: where it is.
        save_id, step, rank, world_size, layout: see `Manifest`.
        counters: what is no tensor; the first rank's part alone has them.
    """

    holder: int
    slot: int
    save_id: str
    step: int
    rank: int
    world_size: int
    layout: str
    counters: dict[str, Any] | None


def newest_of_parts(parts: list[SnapshotPart]) -> FoundSnapshot | None:
    """The snapshot of the newest step that has the parts of all its ranks.

    Parts of the same step are one snapshot only where they come from the same save: a run that went back, and did that
    step again, may have come to other values.
    """
    for step, save_id in sorted({(part.step, part.save_id) for part in parts}, reverse=True):
        by_rank: dict[int, SnapshotPart] = {}
        for part in parts:
            if part.save_id == save_id:
                by_rank.setdefault(part.rank, part)
        first = by_rank.get(0)
        if first is not None and first.counters is not None and len(by_rank) == first.world_size:
            ordered = [by_rank[rank] for rank in range(first.world_size)]
            holders, slots = [part.holder for part in ordered], [part.slot for part in ordered]
            return FoundSnapshot(step, first.counters, holders, slots, first.layout)
    return None


def write_checkpoint(files: MemoryFiles, found: FoundSnapshot, folder: Path) -> None:
    """A snapshot as a checkpoint of the run, for another layout: every holder writes the parts that it can read.

    Collective.

    Args:
        files: on this machine.
        found: the snapshot.
        folder: of the run's checkpoints.

    Raises:
        CheckpointError: on all ranks, naming what cannot be read or written.
    """
    own_rank = dist.get_rank()
    final = step_folder(folder, found.step)
    beside = final.with_name(f".{final.name}.partial")
    error: Exception | None = None
    parts: dict[int, tuple[Manifest, Any]] = {}
    try:
        if own_rank == 0:
            make_room(beside)
        for rank, (holder, slot) in enumerate(zip(found.holders, found.slots, strict=True)):
            if holder == own_rank:
                parts[rank] = files.read(rank, slot)
    except (OSError, CheckpointError) as caught:
        error = caught if isinstance(caught, CheckpointError) else CheckpointError(f"cannot write {final}: {caught}")
    raise_together(error)
    held: list[dict[int, list[Place]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(held, {rank: list(manifest.places) for rank, (manifest, _) in parts.items()})
    chosen = _first_holders({rank: places for each in held for rank, places in each.items()})
    checksums: dict[str, str] = {}
    try:
        for rank, (manifest, data) in parts.items():
            path = beside / f"shard-{rank:05d}-model-00001-of-00001.safetensors"
            checksums[path.name] = _write_shard(path, rank, manifest, views_of_places(data, manifest.places), chosen)
    except OSError as caught:
        error = CheckpointError(f"cannot write {final}: {caught}")
    raise_together(error)
    of_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, checksums)
    try:
        if own_rank == 0:
            names = {place.name for each in held for places in each.values() for place in places}
            devices = sorted({name.split(".")[1] for name in names if name.startswith(RANDOM)})
            state = {"step": found.step, "world_size": len(found.holders), "random_states": devices}
            checksums = {name: digest for of_rank in of_ranks for name, digest in of_rank.items()}
            finish(beside, final, state | {"counters": found.counters}, checksums)
    except OSError as caught:
        error = CheckpointError(f"cannot write {final}: {caught}")
    raise_together(error)


def _first_holders(places: dict[int, list[Place]]) -> dict[tuple[str, tuple[int, ...], tuple[int, ...] | None], int]:
    """The rank that writes each part, among those that hold it alike."""
    chosen: dict[tuple[str, tuple[int, ...], tuple[int, ...] | None], int] = {}
    for rank in sorted(places):
        for place in places[rank]:
            chosen.setdefault((place.name, place.offsets, place.experts), rank)
    return chosen


def _write_shard(
    path: Path,
    rank: int,
    manifest: Manifest,
    views: list[Tensor],
    chosen: dict[tuple[str, tuple[int, ...], tuple[int, ...] | None], int],
) -> str:
    """One rank's part in the form of torch's distributed checkpoint, without what another rank writes; its checksum."""
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, list[int]] = {}
    for place, view in zip(manifest.places, views, strict=True):
        if chosen[place.name, place.offsets, place.experts] != rank or not view.numel():
            continue
        if place.experts is None:
            tensors[place.name], offsets[place.name] = view, list(place.offsets)
            continue
        for expert, row in zip(place.experts, view, strict=True):
            if expert != EMPTY:
                name = f"{place.name}.{expert}"
                tensors[name], offsets[name] = row, list(place.offsets[1:])
    return write_shard(path, tensors, offsets)
