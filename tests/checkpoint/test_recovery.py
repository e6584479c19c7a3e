"""Snapshots in memory: which one is found, what it brings back, what is passed over."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from crossdock.checkpoint import CheckpointError, FoundSnapshot, MemoryFiles, Snapshots, latest_step
from tests.checkpoint.small import Run
from tests.checkpoint.test_failures import equal, message_of
from tests.ranks import RankPool

COUNTERS = {"step": 2, "balance": {"average_routes": [[0.1, 1 / 3]]}}


def files_of(folder: str | Path, machine: int = 0) -> MemoryFiles:
    """Of a machine, in a folder of its own."""
    parent = Path(folder, f"memory-{machine}")
    parent.mkdir(exist_ok=True, parents=True)
    return MemoryFiles(parent, Path(folder, "run"))


def snapshots_of(run: Run, folder: str, ep: int, machines: tuple[int, ...] = (), run_id: str = "run") -> Snapshots:
    """On the machines that are given for each rank; on one where none are."""
    machine = machines[dist.get_rank()] if machines else 0
    layout = f"ep {ep} of {dist.get_world_size()}"
    return Snapshots(files_of(folder, machine), run.checkpointer, run_id, layout, machine)


def take(folder: str, ep: int, steps: tuple[int, ...] = (2,), machines: tuple[int, ...] = ()) -> Any:
    """A run that takes snapshots after some of its steps, and is gone; what it held after the last of these."""
    run = Run(f"{folder}/run/checkpoint", ep, 9)
    snapshots = snapshots_of(run, folder, ep, machines)
    for step in steps:
        run.train(step - run.step)
        snapshots.save(step, COUNTERS | {"step": step})
    held = run.contents(), torch.get_rng_state().numpy()
    run.train(1)  # must not change what was taken
    snapshots.wait()
    return held


def bring_back(folder: str, ep: int, machines: tuple[int, ...] = ()) -> Any:
    """Another run, of other values: the snapshot that it finds, and what it holds then."""
    torch.manual_seed(17)
    run = Run(f"{folder}/run/checkpoint", ep, 9, seed=1)
    run.train(1)
    snapshots = snapshots_of(run, folder, ep, machines)
    found = snapshots.newest()
    if found is None:
        return None
    snapshots.load(found)
    run.step = found.step
    return (
        (run.contents(), torch.get_rng_state().numpy()),
        found,
        run.train(1),
        message_of(lambda: snapshots.save(3, {})),
    )


@pytest.mark.parametrize("ep", [1, 2])
def test_a_snapshot_brings_everything_back(ranks: RankPool, tmp_path: Path, ep: int) -> None:
    taken = ranks.run(2, take, str(tmp_path), ep)
    for (contents, random_state), ((found_contents, found_state), found, *_) in zip(
        taken, ranks.run(2, bring_back, str(tmp_path), ep), strict=True
    ):
        assert equal(contents, found_contents)
        assert (random_state == found_state).all()
        assert found.counters == COUNTERS
    assert latest_step(tmp_path / "run/checkpoint") is None, "from memory, not by way of the disk"


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 1), (4, 2)])
def test_a_snapshot_is_taken_up_on_another_layout(ranks: RankPool, tmp_path: Path, world_size: int, ep: int) -> None:
    (contents, _), *_ = ranks.run(2, take, str(tmp_path), 2)
    (found_contents, _), found, _, saved = ranks.run(world_size, bring_back, str(tmp_path), ep)[0]
    assert equal(contents, found_contents)
    assert found.counters == COUNTERS
    assert latest_step(tmp_path / "run/checkpoint") == 2, "as a checkpoint, which any layout reads"
    assert saved == "no error"


def test_replicas_are_written_once(ranks: RankPool, tmp_path: Path) -> None:
    # Four ranks, each pair of which holds all experts: what two hold alike is in the checkpoint once.
    (contents, _), *_ = ranks.run(4, take, str(tmp_path), 2)
    (found_contents, _), *_ = ranks.run(2, bring_back, str(tmp_path), 2)[0]
    assert equal(contents, found_contents)


def test_a_machine_without_memory_gets_its_part_from_its_partner(ranks: RankPool, tmp_path: Path) -> None:
    machines = (0, 0, 1, 1)
    taken = ranks.run(4, take, str(tmp_path), 2, (1, 2), machines)
    shutil.rmtree(tmp_path / "memory-1")
    brought = ranks.run(4, bring_back, str(tmp_path), 2, machines)
    for (contents, random_state), ((found_contents, found_state), found, *_) in zip(taken, brought, strict=True):
        assert equal(contents, found_contents)
        assert (random_state == found_state).all()
        assert found.step == 2
    assert latest_step(tmp_path / "run/checkpoint") is None


def test_machines_that_change_places_find_their_parts(ranks: RankPool, tmp_path: Path) -> None:
    taken = ranks.run(4, take, str(tmp_path), 2, (2,), (0, 0, 1, 1))
    brought = ranks.run(4, bring_back, str(tmp_path), 2, (1, 1, 0, 0))
    for (contents, _), ((found_contents, _), *_) in zip(taken, brought, strict=True):
        assert equal(contents, found_contents)


@contextmanager
def what_is_said() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("crossdock").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("crossdock").removeHandler(handler)


def find(folder: str, run_id: str = "run") -> tuple[FoundSnapshot | None, list[str]]:
    """What a new run finds, and what it says."""
    run = Run(f"{folder}/run/checkpoint", 2, 9)
    with what_is_said() as said:
        found = snapshots_of(run, folder, 2, run_id=run_id).newest()
    return found, said


def damages(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each way in which the newer of two snapshots is damaged, and the file whose name must be told."""
    rng = random.Random(0)
    newer = folder / next(folder.glob("memory-0/*")).relative_to(folder)
    for name in ("rank-00001-1.data", "rank-00000-1.json"):
        path = newer / name
        whole = path.read_bytes()
        for case in range(6):
            broken = bytearray(whole)
            if case < 4:
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            else:
                del broken[rng.randrange(len(broken)) :]
            path.write_bytes(broken)
            yield f"{name} {case}", path
        path.write_bytes(whole)
    shutil.copy(newer / "rank-00001-0.data", newer / "rank-00001-1.data")
    yield "another step's data", newer / "rank-00001-1.data"


def test_a_damaged_snapshot_is_named_and_passed_over_for_the_older_one(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, take, str(tmp_path), 2, (1, 2))
    found, said = ranks.run(2, find, str(tmp_path))[0]
    assert found is not None
    assert (found.step, said) == (2, [])
    for case, path in damages(tmp_path):
        found, said = ranks.run(2, find, str(tmp_path))[0]
        assert found is not None, case
        assert found.step == 1, case
        assert len(said) == 1, case
        assert str(path) in said[0] or str(path.with_suffix(".json")) in said[0], case


def test_a_snapshot_that_was_never_whole_is_passed_over(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, take, str(tmp_path), 2, (1, 2))
    next(tmp_path.glob("memory-0/*/rank-00001-1.json")).unlink()
    found, _ = ranks.run(2, find, str(tmp_path))[0]
    assert found is not None
    assert found.step == 1


def test_parts_of_two_snapshots_of_a_step_are_not_mixed(ranks: RankPool, tmp_path: Path) -> None:
    # As where the first rank was killed before it took its part of step 2 for the second time.
    ranks.run(2, take, str(tmp_path), 2, (1, 2))
    (memory,) = tmp_path.glob("memory-0/*")
    shutil.copytree(memory, tmp_path / "first start")
    ranks.run(2, take, str(tmp_path), 2, (1, 2))
    for name in ("rank-00000-1.json", "rank-00000-1.data"):
        shutil.copy(tmp_path / "first start" / name, memory / name)
    found, said = ranks.run(2, find, str(tmp_path))[0]
    assert found is not None
    assert (found.step, said) == (1, [])


def test_snapshots_of_another_run_in_the_same_folder_are_none(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, take, str(tmp_path), 2)
    found, _ = ranks.run(2, find, str(tmp_path), "another run")[0]
    assert found is None


@contextmanager
def second_rank_fails() -> Iterator[None]:
    """Its snapshots are never whole; the first rank's are."""
    whole = MemoryFiles.finish

    def finish(files: MemoryFiles, *arguments: Any) -> None:
        if dist.get_rank() == 1:
            raise CheckpointError("the memory is full")
        whole(files, *arguments)

    with mock.patch.object(MemoryFiles, "finish", finish):
        yield


def fail_between_whole_ones(folder: str) -> tuple[list[int | None], list[str], int]:
    """The step that is found after each failure, two before each snapshot that is whole; what is said; files left."""
    run = Run(f"{folder}/run/checkpoint", 2, 9)
    snapshots = snapshots_of(run, folder, 2)
    steps: list[int | None] = []
    with what_is_said() as said:
        for step in (3, 6, 9):
            for failing in (step - 2, step - 1):
                with second_rank_fails():
                    snapshots.save(failing, {"step": failing})
                    found = snapshots.newest()
                steps.append(found and found.step)
            snapshots.save(step, {"step": step})
        with second_rank_fails():
            snapshots.save(10, {"step": 10})
            snapshots.clear()  # as a run does that ends well
    return steps, said, len(list(Path(folder, "memory-0").iterdir()))


def test_after_a_snapshot_that_failed_the_one_before_is_whole(ranks: RankPool, tmp_path: Path) -> None:
    steps, said, files = ranks.run(2, fail_between_whole_ones, str(tmp_path))[0]
    assert steps == [None, None, 3, 3, 6, 6]
    assert said == ["a snapshot is not whole: the memory is full"] * 7
    assert files == 0


def too_small(folder: str) -> str:
    run = Run(f"{folder}/run/checkpoint", 2, 9)
    return message_of(lambda: snapshots_of(run, folder, 2))


def test_a_memory_that_is_too_small_is_told_at_the_start(ranks: RankPool, tmp_path: Path) -> None:
    memory = tmp_path / "memory-0"
    memory.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", memory], check=False).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    try:
        for message in ranks.run(2, too_small, str(tmp_path)):
            assert message.startswith(f"fault_tolerance.snapshot_folder: {memory} has room for ")
            assert "--shm-size" in message
    finally:
        subprocess.run(["umount", memory], check=True)


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    files.make()
    files.folder.chmod(0o777)
    with pytest.raises(CheckpointError, match="this user's alone"):
        files.make()
    files.folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    files.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="this user's alone"):
        files.make()
