"""Snapshots as files in a machine's memory (`/dev/shm`), which outlive the processes that wrote them."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossdock.checkpoint.checksums import checksum
from crossdock.checkpoint.folders import CheckpointError
from crossdock.checkpoint.held import Place

__all__ = ["NUM_SLOTS", "Manifest", "MemoryFiles", "bytes_of_places", "views_of_places"]

NUM_SLOTS = 2
"""Snapshots of a rank that there is room for: the newest whole one, and the one that is being written."""
_ALIGNMENT = 64
_FORMAT = 2
_MANIFEST = re.compile(r"rank-(\d{5})-(\d)\.json")


@dataclass(frozen=True)
class Manifest:
    """What a snapshot of one rank is.

    Attributes:
        run_id: of the run that it is of.
        save_id: the same for all ranks' parts of one snapshot, and for those of no other.
        step: after which it was taken.
        rank, world_size: of the rank that took it.
        layout: of the run, as a person reads it.
        places: of the tensors, in the order in which they lie in the file.
        counters: what is no tensor; see `Checkpointer.save`.
        num_bytes: of the data.
        digest: `checksum` of the data.
    """

    run_id: str
    save_id: str
    step: int
    rank: int
    world_size: int
    layout: str
    places: tuple[Place, ...]
    counters: dict[str, Any]
    num_bytes: int
    digest: str

    def to_bytes(self) -> bytes:
        body = json.dumps({"format": _FORMAT, **asdict(self), "places": [list(place) for place in self.places]})
        return json.dumps({"checksum": checksum(body.encode()), "body": body}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises ValueError for what is none."""
        try:
            outer = json.loads(data)
            body = outer["body"]
            if checksum(body.encode()) != outer["checksum"]:
                raise ValueError("its checksum is another")
            values = json.loads(body)
            if values.pop("format") != _FORMAT:
                raise ValueError("it is of another version")
            places = tuple(Place.from_json(place) for place in values.pop("places"))
            return cls(places=places, **values)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(str(error)) from None


class MemoryFiles:
    """The snapshots on this machine of one run: of its ranks here, and those it keeps for another machine's.

    Args:
        parent: where the folder is made, in memory.
        run_folder: names it.
    """

    def __init__(self, parent: Path, run_folder: Path) -> None:
        name = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:16]
        self.folder = parent / f"crossdock-{os.getuid()}-{name}"

    def make(self) -> None:
        """Make the folder, for this user alone.

        Raises:
            CheckpointError: where it cannot be made, or is another user's.
        """
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            found = self.folder.lstat()
        except OSError as error:
            raise CheckpointError(f"fault_tolerance.snapshot_folder: cannot make {self.folder}: {error}") from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise CheckpointError(
                f"fault_tolerance.snapshot_folder: {self.folder} must be a folder that is this user's alone; remove it"
            )

    def room(self) -> int:
        """Bytes that may be written: free ones, and what is there already."""
        present = sum(path.stat().st_blocks * 512 for path in self.folder.glob("*.data"))
        return shutil.disk_usage(self.folder).free + present

    def open(self, rank: int, slot: int, num_bytes: int) -> mmap.mmap:
        """The data of a slot, for writing; its manifest is gone, so that nobody takes it for whole.

        Raises:
            CheckpointError: where there is no memory for it.
        """
        self._manifest_path(rank, slot).unlink(missing_ok=True)
        path = self._data_path(rank, slot)
        size = max(num_bytes, 1)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(descriptor).st_size != size:
                    os.ftruncate(descriptor, size)
                # Without memory behind it, writing to the map would kill the process.
                os.posix_fallocate(descriptor, 0, size)
                return mmap.mmap(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            room = "" if error.errno != errno.ENOSPC else f"; {shutil.disk_usage(self.folder).free:,} bytes are free"
            raise CheckpointError(f"fault_tolerance.snapshot_folder: cannot write {path}: {error}{room}") from None

    def finish(self, slot: int, manifest: bytes, rank: int) -> None:
        """Leave the manifest, which makes the slot whole. Raises CheckpointError."""
        path = self._manifest_path(rank, slot)
        beside = path.with_suffix(".partial")
        try:
            beside.write_bytes(manifest)
            beside.rename(path)
        except OSError as error:
            raise CheckpointError(f"fault_tolerance.snapshot_folder: cannot write {path}: {error}") from None

    def found(self) -> Iterator[tuple[int, int, Path]]:
        """Rank, slot and manifest of all that are whole, as far as is known without reading them."""
        for path in sorted(self.folder.glob("rank-*.json")) if self.folder.is_dir() else ():
            if match := _MANIFEST.fullmatch(path.name):
                yield int(match[1]), int(match[2]), path

    def read(self, rank: int, slot: int) -> tuple[Manifest, mmap.mmap]:
        """A snapshot whose bytes are those that were written.

        Raises:
            CheckpointError: for one that is damaged, naming the file.
        """
        path, data_path = self._manifest_path(rank, slot), self._data_path(rank, slot)
        try:
            manifest = Manifest.from_bytes(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"snapshot {path} is damaged: {error}") from None
        try:
            with open(data_path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"snapshot {data_path} is damaged: {error}") from None
        if manifest.rank != rank or len(data) != max(manifest.num_bytes, 1):
            raise CheckpointError(f"snapshot {data_path} is damaged: it is not the data of {path.name}")
        if checksum(memoryview(data)[: manifest.num_bytes]) != manifest.digest:
            raise CheckpointError(f"snapshot {data_path} is damaged: its checksum is not that in {path.name}")
        return manifest, data

    def remove(self, rank: int) -> None:
        """Remove what there is of a rank."""
        for path in self.folder.glob(f"rank-{rank:05d}-*"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all that is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _data_path(self, rank: int, slot: int) -> Path:
        return self.folder / f"rank-{rank:05d}-{slot}.data"

    def _manifest_path(self, rank: int, slot: int) -> Path:
        return self.folder / f"rank-{rank:05d}-{slot}.json"


def views_of_places(data: mmap.mmap | bytearray, places: Sequence[Place]) -> list[Tensor]:
    """The tensors at `places`, as views of a slot's data. Raises ValueError where these are too few bytes."""
    views, offset = [], 0
    for place in places:
        count = place.num_bytes // place.torch_dtype.itemsize
        if offset + place.num_bytes > len(data):
            raise ValueError(f"there are {len(data)} bytes, too few for {place.name}")
        if count:
            views.append(torch.frombuffer(data, dtype=place.torch_dtype, count=count, offset=offset).view(place.shape))
        else:
            views.append(torch.empty(place.shape, dtype=place.torch_dtype))
        offset += -(-place.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return views


def bytes_of_places(places: Sequence[Place]) -> int:
    """How many bytes of data `views_of_places` takes."""
    return sum(-(-place.num_bytes // _ALIGNMENT) * _ALIGNMENT for place in places)
