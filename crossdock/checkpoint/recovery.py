"""Snapshots of a run in the machines' memory, and a copy of each on another machine.

Every rank copies what it holds into files of its machine's memory (`MemoryFiles`), in the time of a step; a thread adds
a checksum and sends the copy to its partner, the same rank of the next machine, while training goes on. There are two
slots: a snapshot is written over the older one, and only once the newer one is whole on all ranks; one that has
failed is written over itself. So a process that is killed at any moment leaves a whole snapshot behind, and so does a
machine that is lost, on its partner.
"""

from __future__ import annotations

import copy
import logging
import mmap
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from crossdock.checkpoint.background import Background
from crossdock.checkpoint.checksums import checksum
from crossdock.checkpoint.distributed import Checkpointer, set_random_states
from crossdock.checkpoint.folders import CheckpointError
from crossdock.checkpoint.found_snapshot import RANDOM, FoundSnapshot, SnapshotPart, newest_of_parts, write_checkpoint
from crossdock.checkpoint.held import Held, Place
from crossdock.checkpoint.memory_files import NUM_SLOTS, Manifest, MemoryFiles, bytes_of_places, views_of_places
from crossdock.comm import raise_together

__all__ = ["Snapshots"]

logger = logging.getLogger(__name__)

_PIECE = 256 * 2**20  # Bytes of one message between partners.


class Snapshots:
    """Of one run, on all its ranks. All methods are collective.

    Args:
        files: on this machine.
        checkpointer: of the run.
        run_id: of the run, the same whenever it is started.
        layout: of the ranks, the same text for the same layout.
        machine: number of this rank's machine; a machine's ranks give the same.
        on_partner: whether the next machine has a copy, where there is one.
        timeout: of what partners exchange; torch's if `None`.

    Raises:
        CheckpointError: on all ranks, where the memory of any machine has no room for the snapshots of its ranks.
    """

    def __init__(
        self,
        files: MemoryFiles,
        checkpointer: Checkpointer,
        run_id: str,
        layout: str,
        machine: int,
        *,
        on_partner: bool = True,
        timeout: timedelta | None = None,
    ) -> None:
        self._files, self._checkpointer = files, checkpointer
        self._run_id, self._layout = run_id, layout
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._background = Background(timeout)
        self._slot = 0  # The next snapshot's.
        self._is_writing = False
        machines: list[int] = [0] * self._world_size
        dist.all_gather_object(machines, machine)
        self._partners = _partners(machines) if on_partner else [None] * self._world_size
        self._machines = machines
        names = [uuid.uuid4().hex]
        dist.broadcast_object_list(names, src=0)
        self._start, self._num_saves = names[0], 0
        self._make_room()

    def save(self, step: int, counters: dict[str, Any]) -> None:
        """Copy what this rank holds; the rest is done while training goes on. Waits for the snapshot before.

        Raises:
            CheckpointError: on all ranks, if any of them found no room for the copy.
        """
        self.wait()
        self._num_saves += 1
        error: Exception | None = None
        data, manifest = None, None
        try:
            data, manifest = self._copy(step, copy.deepcopy(counters))
        except CheckpointError as caught:
            error = caught
        raise_together(error)
        assert data is not None
        assert manifest is not None
        slot, self._is_writing = self._slot, True

        def finish_slot(group: dist.ProcessGroup | None) -> None:
            digest = checksum(memoryview(data)[: manifest.num_bytes])
            written = replace(manifest, digest=digest).to_bytes()
            self._files.finish(slot, written, self._rank)
            self._exchange(slot, written, data, manifest.num_bytes, group)

        self._background.start(finish_slot, f"cannot keep the snapshot of step {step}")

    def wait(self) -> None:
        """Wait until what `save` has begun is whole on all ranks; where any of them failed, the one before stays."""
        was_writing, self._is_writing = self._is_writing, False
        try:
            self._background.wait()
        except CheckpointError as error:
            logger.warning(f"a snapshot is not whole: {error}")
            return
        if was_writing:
            self._slot = (self._slot + 1) % NUM_SLOTS

    def newest(self) -> FoundSnapshot | None:
        """The newest that is whole across the ranks, on any machine; damaged ones are named and passed over."""
        self.wait()
        own: list[SnapshotPart] = []
        here = [rank for rank in range(self._world_size) if self._machines[rank] == self._machines[self._rank]]
        damaged = []
        for index, (rank, slot, _) in enumerate(self._files.found()):
            if here[index % len(here)] != self._rank:
                continue
            try:
                manifest, _ = self._files.read(rank, slot)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            if manifest.run_id == self._run_id:
                own.append(
                    SnapshotPart(
                        self._rank,
                        slot,
                        manifest.save_id,
                        manifest.step,
                        rank,
                        manifest.world_size,
                        manifest.layout,
                        manifest.counters if rank == 0 else None,
                    )
                )
        gathered: list[tuple[list[SnapshotPart], list[str]]] = [([], [])] * self._world_size
        dist.all_gather_object(gathered, (own, damaged))
        for message in (message for _, messages in gathered for message in messages):
            logger.warning(f"{message}; passed over")
        return newest_of_parts([part for parts, _ in gathered for part in parts])

    def load(self, found: FoundSnapshot) -> None:
        """Give model, optimizer and random state the values of a snapshot.

        On the layout that it was taken on, every rank copies its part from memory, its own machine's or another's. On
        any other the snapshot is written as a checkpoint of the run, and loaded from there.

        Raises:
            CheckpointError: on all ranks, naming what cannot be read or written.
        """
        if len(found.holders) != self._world_size or found.layout != self._layout:
            write_checkpoint(self._files, found, self._checkpointer.folder)
            self._checkpointer.load(found.step)
            self.clear()
            return
        error: Exception | None = None
        manifest, data = None, None
        try:
            manifest, data = self._fetch(found)
        except CheckpointError as caught:
            error = caught
        raise_together(error)
        assert manifest is not None
        assert data is not None
        held = self._held()
        places = tuple(part.place for part in held)
        if places != manifest.places:
            odd = next((ours for ours, theirs in zip(places, manifest.places, strict=False) if ours != theirs), None)
            where = f": {odd.name} lies elsewhere" if odd is not None else ""
            error = CheckpointError(f"the snapshot of step {found.step} is not of this model{where}")
        raise_together(error)
        with torch.no_grad():
            for part, view in zip(held, views_of_places(data, manifest.places), strict=True):
                part.local.copy_(view)
        self._checkpointer.weights_changed()
        random = {part.place.name: part.local for part in held if part.place.name.startswith(RANDOM)}
        set_random_states({name.removeprefix(RANDOM).partition(".")[0]: state for name, state in random.items()})
        self._slot = (found.slots[self._rank] + 1) % NUM_SLOTS

    def clear(self) -> None:
        """Remove all snapshots of the run, on all machines: it has ended well, or goes on from a checkpoint."""
        self.wait()
        self._files.clear()

    def _held(self) -> list[Held]:
        """This rank's part of everything; random states are copies."""
        held = self._checkpointer.held()
        for device, state in self._checkpointer.random_states().items():
            place = Place(f"{RANDOM}{device}.{self._rank}", "uint8", tuple(state.shape), (0,))
            held.append(Held(place, state))
        return held

    def _copy(self, step: int, counters: dict[str, Any]) -> tuple[mmap.mmap, Manifest]:
        held = self._held()
        places = tuple(part.place for part in held)
        num_bytes = bytes_of_places(places)
        self._files.make()
        data = self._files.open(self._rank, self._slot, num_bytes)
        for part, view in zip(held, views_of_places(data, places), strict=True):
            view.copy_(part.local)
        manifest = Manifest(
            run_id=self._run_id,
            # All ranks have saved as often.
            save_id=f"{self._start}-{self._num_saves}",
            step=step,
            rank=self._rank,
            world_size=self._world_size,
            layout=self._layout,
            places=places,
            counters=counters,
            num_bytes=num_bytes,
            digest="",
        )
        return data, manifest

    def _exchange(
        self, slot: int, manifest: bytes, data: mmap.mmap, num_bytes: int, group: dist.ProcessGroup | None
    ) -> None:
        """Send this rank's snapshot to its partner, and keep those that it is the partner of."""
        partner = self._partners[self._rank]
        sources = [rank for rank, other in enumerate(self._partners) if other == self._rank]
        sending = []
        if partner is not None:
            head = torch.frombuffer(bytearray(manifest), dtype=torch.uint8)
            sizes = torch.tensor([len(head), num_bytes])
            whole = torch.frombuffer(data, dtype=torch.uint8, count=num_bytes)
            sending = [dist.isend(part, partner, group) for part in (sizes, head, *whole.split(_PIECE))]
        for rank in sources:
            sizes = torch.zeros(2, dtype=torch.int64)
            dist.recv(sizes, rank, group)
            head_size, data_size = sizes.tolist()
            head = torch.empty(head_size, dtype=torch.uint8)
            dist.recv(head, rank, group)
            kept = self._files.open(rank, slot, data_size)
            for piece in torch.frombuffer(kept, dtype=torch.uint8, count=data_size).split(_PIECE):
                dist.recv(piece, rank, group)
            self._files.finish(slot, head.numpy().tobytes(), rank)
        for work in sending:
            assert work is not None
            work.wait()

    def _fetch(self, found: FoundSnapshot) -> tuple[Manifest, mmap.mmap | bytearray]:
        """This rank's part of a snapshot, from whoever can read it."""
        own: tuple[Manifest, Any] | None = None
        for rank, (holder, slot) in enumerate(zip(found.holders, found.slots, strict=True)):
            if holder != self._rank and rank != self._rank:
                continue
            if self._machines[holder] == self._machines[rank]:
                if rank == self._rank:
                    own = self._files.read(rank, slot)
            elif holder == self._rank:
                manifest, data = self._files.read(rank, slot)
                head = torch.frombuffer(bytearray(manifest.to_bytes()), dtype=torch.uint8)
                dist.send(torch.tensor([len(head), manifest.num_bytes]), rank)
                dist.send(head, rank)
                for piece in torch.frombuffer(data, dtype=torch.uint8, count=manifest.num_bytes).split(_PIECE):
                    dist.send(piece, rank)
            else:
                sizes = torch.zeros(2, dtype=torch.int64)
                dist.recv(sizes, holder)
                head = torch.empty(int(sizes[0]), dtype=torch.uint8)
                dist.recv(head, holder)
                received = bytearray(int(sizes[1]))
                for piece in torch.frombuffer(received, dtype=torch.uint8).split(_PIECE):
                    dist.recv(piece, holder)
                own = (Manifest.from_bytes(head.numpy().tobytes()), received)
        assert own is not None
        return own

    def _make_room(self) -> None:
        """Make the folder, and see whether all this machine's ranks find room."""
        error: Exception | None = None
        try:
            self._files.make()
            room = self._files.room()
        except (OSError, CheckpointError) as caught:
            error = caught if isinstance(caught, CheckpointError) else CheckpointError(str(caught))
            room = 0
        own = bytes_of_places([part.place for part in self._held()])
        needs: list[int] = [0] * self._world_size
        dist.all_gather_object(needs, own)
        here = self._machines[self._rank]
        needed = NUM_SLOTS * sum(
            size
            for rank, size in enumerate(needs)
            for keeper in (rank, self._partners[rank])
            if keeper is not None and self._machines[keeper] == here
        )
        if error is None and needed > room:
            error = CheckpointError(
                f"fault_tolerance.snapshot_folder: {self._files.folder.parent} has room for {room:,} bytes, and the "
                f"snapshots of this machine's ranks take {needed:,}. Give it more (docker run --shm-size, an emptyDir "
                "with medium Memory), name another folder in memory, or set fault_tolerance.snapshot_interval = 0"
            )
        raise_together(error)


def _partners(machines: Sequence[int]) -> list[int | None]:
    """The rank that keeps a copy for each: the one of the same place on the next machine; `None` with one machine."""
    ranks_of = {machine: [rank for rank, of in enumerate(machines) if of == machine] for machine in set(machines)}
    order = sorted(ranks_of)
    if len(order) == 1:
        return [None] * len(machines)
    partners: list[int | None] = []
    for rank, machine in enumerate(machines):
        following = ranks_of[order[(order.index(machine) + 1) % len(order)]]
        partners.append(following[ranks_of[machine].index(rank) % len(following)])
    return partners
