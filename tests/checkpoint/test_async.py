"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from crossdock.checkpoint import latest_step
from crossdock.checkpoint.background import Background, Staging
from crossdock.checkpoint.dcp_writing import DCPWriter
from tests.checkpoint.hf_folders import snapshot
from tests.checkpoint.small import Run
from tests.checkpoint.test_failures import HalfWriter, equal, message_of
from tests.ranks import RankPool

WRITER = "crossdock.checkpoint.distributed.DCPWriter"
SECONDS = 60


@contextmanager
def held_writes(rank: int | None = None) -> Iterator[threading.Event]:
    """Writes (of one rank, or of all) do not begin until the event is set."""
    go_on = threading.Event()

    class HeldWriter(DCPWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            assert rank not in (None, dist.get_rank()) or go_on.wait(SECONDS)
            return super().write_data(plan, planner)

    with mock.patch(WRITER, HeldWriter):
        yield go_on


def stored(folder: Path) -> dict[str, tuple[Any, bytes]]:
    """Header and data of every file below `folder`; what a header says, since the order in it is by chance.

    Checksums differ by that order, and are left out.
    """
    found = {}
    for name, content in snapshot(folder).items():
        if name.endswith("state.json"):
            found[name] = (re.sub(r'"checksum": "\w+"', "", content.decode()), b"")
            continue
        length = int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else 0
        found[name] = (json.loads(content[8 : 8 + length]) if length else None, content[8 + length if length else 0 :])
    return found


def save_in_both_ways(folder: str, ep: int) -> dict[str, Any]:
    """Two steps of checkpoints, blocking and, held until training has gone on, in the background."""
    run = Run("unused", ep, 9, saving={"async_mode": "async"})
    background = run.at(f"{folder}/async").checkpointer
    newest, losses = [], []
    for step in (1, 3):
        run.train(1)
        run.at(f"{folder}/blocking").checkpointer.save(step, {"samples": 12}, blocking=True)
        with held_writes() as go_on:
            began = background.save(step, {"samples": 12})
            losses += run.train(1)
            newest.append(latest_step(Path(folder, "async")))
            go_on.set()
            background.wait()
        assert began == Path(folder, "async", f"step-{step:08d}")
    return {"newest": newest, "losses": losses, "undisturbed": Run("unused", ep, 9).train(4)[1::2]}


@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_files_equal_those_of_a_blocking_save_though_training_has_gone_on(
    ranks: RankPool, tmp_path: Path, world_size: int, ep: int
) -> None:
    for result in ranks.run(world_size, save_in_both_ways, str(tmp_path), ep):
        assert result["newest"] == [None, 1], "one is there that is not whole"
        assert result["losses"] == result["undisturbed"]
    written = stored(tmp_path / "async")
    assert sum(len(data) for _, data in written.values()) > 100_000
    assert len([name for name in written if "random_state.cpu.0" in str(written[name][0])]) == 2
    assert written == stored(tmp_path / "blocking")


def saves_that_meet(folder: str, when_busy: str) -> list[tuple[bool, int | None]]:
    """Three saves: the second begins while the first is held on one rank. Whether they began, and the newest then."""
    run = Run(folder, 2, saving={"async_mode": "async", "when_busy": when_busy, "keep_latest_k": 0})
    run.train(1)
    seen = []
    with held_writes(rank=1) as go_on:
        seen.append((run.checkpointer.save(1, {}) is not None, latest_step(Path(folder))))
        if when_busy == "wait":
            threading.Timer(0.3, go_on.set).start()
        seen.append((run.checkpointer.save(2, {}) is not None, latest_step(Path(folder))))
        go_on.set()
        run.checkpointer.wait()
    seen.append((run.checkpointer.save(3, {}, blocking=True) is not None, latest_step(Path(folder))))
    return seen


def test_a_second_save_waits_for_the_first(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, saves_that_meet, str(tmp_path), "wait") == [[(True, None), (True, 1), (True, 3)]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (1, 2, 3)]


def test_or_is_skipped_on_all_ranks_and_the_last_one_never(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, saves_that_meet, str(tmp_path), "skip") == [[(True, None), (False, None), (True, 3)]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (1, 3)]


def busy_on_one_rank() -> tuple[bool, bool]:
    background, go_on = Background(), threading.Event()
    background.start(lambda group: dist.get_rank() == 0 or go_on.wait(SECONDS), "it")
    before = background.is_busy()
    go_on.set()
    background.wait()
    return before, background.is_busy()


def test_a_rank_that_is_done_knows_of_one_that_is_not(ranks: RankPool) -> None:
    assert ranks.run(2, busy_on_one_rank) == [(True, False)] * 2


def fail_in_the_background(folder: str) -> dict[str, Any]:
    """Saves that fail behind the training's back, and when that is told; what loads after each."""
    run = Run(folder, 2, saving={"async_mode": "async"})
    run.train(1)
    run.checkpointer.save(1, {})
    run.checkpointer.wait()
    whole = run.contents()
    other = Run(folder, 2, seed=1)
    other.train(1)

    def loads() -> bool:
        other.checkpointer.load(latest_step(Path(folder)) or 0)
        return equal(other.contents(), whole)

    told: dict[str, Any] = {}
    with mock.patch(WRITER, HalfWriter):
        told["begins"] = message_of(lambda: run.checkpointer.save(2, {}))
        run.train(1)
        told["at the next save"] = message_of(lambda: run.checkpointer.save(3, {}))
        told["once"] = message_of(run.checkpointer.wait)
        run.checkpointer.save(3, {})
        told["at the end"] = message_of(run.checkpointer.wait)
        run.checkpointer.save(3, {})
        told["before the last"] = message_of(lambda: run.checkpointer.save(4, {}, blocking=True))
    no_memory = mock.patch.object(Staging, "copy", side_effect=MemoryError("none is left"))
    with no_memory if dist.get_rank() == 1 else nullcontext():
        told["begins without memory"] = message_of(lambda: run.checkpointer.save(4, {}))
    told["no memory on a rank"] = message_of(run.checkpointer.wait)
    told["loads"] = loads()
    run.checkpointer.save(5, {})
    run.checkpointer.wait()
    whole = run.contents()
    told["loads the next"] = loads()
    return told


def test_a_failure_is_told_once_on_all_ranks_and_the_previous_checkpoint_loads(ranks: RankPool, tmp_path: Path) -> None:
    for told in ranks.run(2, fail_in_the_background, str(tmp_path)):
        for when, step in (("at the next save", 2), ("at the end", 3), ("before the last", 3)):
            assert f"step-{step:08d}: OSError: [Errno 28] No space left on device" in told.pop(when)
        assert "none is left" in told.pop("no memory on a rank")
        assert told.pop("loads")
        assert told.pop("loads the next")
        assert told == dict.fromkeys(["begins", "once", "begins without memory"], "no error")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000005"]


class DyingWriter(DCPWriter):
    """The second rank is killed in the middle of its data."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            Path(self.path, "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"half of")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(plan, planner)


def save_and_lose_a_rank(folder: str) -> None:
    run = Run(folder, 2, saving={"async_mode": "async"})
    run.train(1)
    run.checkpointer.save(1, {"whole": True})
    run.train(1)
    run.checkpointer.wait()
    with mock.patch(WRITER, DyingWriter):
        run.checkpointer.save(2, {})
        run.checkpointer.wait()


def load_the_newest_and_save(folder: str) -> dict[str, Any]:
    run = Run(folder, 2, seed=1, saving={"async_mode": "async"})
    run.train(1)
    newest = latest_step(Path(folder))
    counters = run.checkpointer.load(newest or 0)
    once = Run("unused", 2)
    once.train(1)
    result = {"newest": newest, "counters": counters, "loads": equal(run.contents(), once.contents())}
    run.checkpointer.save(2, {})
    run.checkpointer.wait()
    return result


def test_a_rank_that_is_killed_while_it_writes_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    pool = RankPool()  # The shared one would lose the workers of all tests.
    try:
        with pytest.raises(AssertionError, match="the process ended") as lost:
            pool.run(2, save_and_lose_a_rank, str(tmp_path))
        assert "no result" not in str(lost.value), "a rank waits for one that is gone"
        assert (tmp_path / ".step-00000002.partial").is_dir()
        for result in pool.run(2, load_the_newest_and_save, str(tmp_path)):
            assert result == {"newest": 1, "counters": {"whole": True}, "loads": True}
    finally:
        pool.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_copies_are_kept_and_independent() -> None:
    staging, tensor = Staging(), torch.arange(6.0).view(2, 3)
    first = staging.copy("a", tensor.t())
    staging.finish()
    tensor.zero_()
    assert first.tolist() == [[0, 3], [1, 4], [2, 5]]
    second = staging.copy("a", torch.ones(3, 2))
    assert second.data_ptr() == first.data_ptr(), "the memory of the copy before"
    assert staging.copy("b", torch.ones(3, 2)).data_ptr() != first.data_ptr()
    assert staging.copy("a", torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
