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

__all__ = ["RANDOM", "FoundSnapshot", "newest_of_parts", "write_checkpoint"]

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


def newest_of_parts(parts: list[tuple[int, int, int, int, int, str, Any]]) -> FoundSnapshot | None:
    """Of parts `(holder, step, rank, slot, world_size, layout, counters)`, the newest step with all ranks."""
    for step in sorted({part[1] for part in parts}, reverse=True):
        of_step = [part for part in parts if part[1] == step]
        for world_size, layout in sorted({(part[4], part[5]) for part in of_step}):
            by_rank: dict[int, tuple[int, int, Any]] = {}
            for holder, _, rank, slot, size, laid_out, counters in of_step:
                if (size, laid_out) == (world_size, layout):
                    by_rank.setdefault(rank, (holder, slot, counters))
            if len(by_rank) == world_size:
                ordered = [by_rank[rank] for rank in range(world_size)]
                return FoundSnapshot(
                    step, ordered[0][2], [holder for holder, _, _ in ordered], [slot for _, slot, _ in ordered], layout
                )
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
