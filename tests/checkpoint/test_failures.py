"""Saves that break off, checkpoints that are damaged, and those that are dropped."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from crossdock.checkpoint import CheckpointError, find_checkpoint, latest_step, newest_whole
from crossdock.checkpoint.checksums import file_checksum, parse_checked_json, to_checked_json
from crossdock.checkpoint.dcp_writing import DCPWriter
from tests.checkpoint.small import Contents, Run
from tests.ranks import RankPool


def equal(ours: Contents, theirs: Contents) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def message_of(action: Callable[[], Any]) -> str:
    """The message of the `CheckpointError` that `action` raises; any other exception is the test's failure."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


class HalfWriter(DCPWriter):
    """Fails on the second rank, in the middle of its data."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() != 1:
            return super().write_data(plan, planner)
        Path(self.path, "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"half of")
        raise OSError(28, "No space left on device")


def fail_in_many_ways(folder: str) -> dict[str, Any]:
    """Save, then fail to save a later step; after each failure, what a new run finds."""
    run = Run(folder, 2)
    run.train(1)
    run.checkpointer.save(1, {})
    whole = run.contents()
    run.train(1)
    other = Run(folder, 2, seed=1)
    other.train(1)

    def save(counters: Any) -> dict[str, Any]:
        message = message_of(lambda: run.checkpointer.save(2, counters))
        newest = latest_step(Path(folder))
        assert newest is not None
        other.checkpointer.load(newest)
        return {"message": message, "newest": newest, "loads": equal(other.contents(), whole)}

    writer = "crossdock.checkpoint.distributed.DCPWriter"
    outcomes = {}
    with mock.patch(writer, HalfWriter):
        outcomes["disk full on a rank"] = save({})
    outcomes["counters that JSON cannot hold"] = save({"step": {1, 2}})
    with mock.patch.object(Path, "rename", side_effect=OSError("no rename today")):
        outcomes["rename fails"] = save({})
    whole = run.contents()
    outcomes["nothing fails"] = save({})
    return outcomes


def test_a_save_that_breaks_off_leaves_the_previous_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    for outcomes in ranks.run(2, fail_in_many_ways, str(tmp_path)):
        assert "No space left on device" in outcomes["disk full on a rank"]["message"]
        assert "step-00000002" in outcomes["disk full on a rank"]["message"]
        assert "not JSON serializable" in outcomes["counters that JSON cannot hold"]["message"]
        assert "no rename today" in outcomes["rename fails"]["message"]
        assert outcomes["nothing fails"]["message"] == "no error"
        assert [outcome["newest"] for outcome in outcomes.values()] == [1, 1, 1, 2]
        assert all(outcome["loads"] for outcome in outcomes.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def save_where_a_file_is(path: str) -> str:
    return message_of(lambda: Run(path, 2).checkpointer.save(1, {}))


def test_a_folder_that_cannot_be_made_is_named(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_text("a file")
    for message in ranks.run(2, save_where_a_file_is, str(path)):
        assert re.search(f"cannot write below {path}: .*(Not a directory|File exists)", message)


def save_over_leftovers(folder: str) -> dict[str, Any]:
    """Steps 1 and 2, where a crash has left parts of a step 2 and of an older one; then step 2 again."""
    run = Run(folder, 2)
    run.train(1)
    run.checkpointer.save(1, {})
    if dist.get_rank() == 0:
        for leftover in (".step-00000002.partial", ".step-00000007.partial", ".step-00000001.removed"):
            Path(folder, leftover).mkdir()
            Path(folder, leftover, "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"junk")
            Path(folder, leftover, "state.json").write_text("{}")
    dist.barrier()
    newest = latest_step(Path(folder))
    run.checkpointer.save(2, {})
    run.train(1)
    run.checkpointer.save(2, {"second": True})
    other = Run(folder, 2, seed=1)
    other.train(1)
    counters = other.checkpointer.load(2)
    return {"newest": newest, "counters": counters, "loads": equal(other.contents(), run.contents())}


def test_leftovers_are_ignored_and_removed(ranks: RankPool, tmp_path: Path) -> None:
    for result in ranks.run(2, save_over_leftovers, str(tmp_path)):
        assert result == {"newest": 1, "counters": {"second": True}, "loads": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def save_steps(folder: str, keep_latest_k: int, steps: list[int]) -> None:
    run = Run(folder, 1, keep_latest_k=keep_latest_k)
    run.train(1)
    for step in steps:
        run.checkpointer.save(step, {})


@pytest.mark.parametrize(
    ("keep_latest_k", "steps", "kept"),
    [
        (0, [1, 2, 3], [1, 2, 3]),
        (1, [1, 2, 3], [3]),
        (2, [8, 9, 10, 100_000_000], [10, 100_000_000]),
        (2, [20, 30, 10], [10, 30]),  # a run that was taken back to before its last checkpoints
        (1, [20, 10], [10]),
    ],
)
def test_the_newest_checkpoints_are_kept(
    ranks: RankPool, tmp_path: Path, keep_latest_k: int, steps: list[int], kept: list[int]
) -> None:
    ranks.run(1, save_steps, str(tmp_path), keep_latest_k, steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"step-{step:08d}" for step in kept)
    assert latest_step(tmp_path) == max(kept)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_step(tmp_path / "absent") is None
    (tmp_path / ".step-00000003.partial").mkdir()
    assert latest_step(tmp_path) is None, "a write that broke off"


def test_a_checkpoint_without_its_state_is_damaged(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, save_steps, str(tmp_path / "checkpoint"), 0, [1, 2])
    state = tmp_path / "checkpoint/step-00000002/state.json"
    state.unlink()
    assert find_checkpoint(tmp_path) == (tmp_path / "checkpoint", 2), "not the older one in silence"
    assert find_checkpoint(state.parent) == (tmp_path / "checkpoint", 2)
    newest, messages = newest_whole(tmp_path / "checkpoint")
    assert newest == 1
    assert [str(state.parent) in message and "cannot read state.json" in message for message in messages] == [True]
    (tmp_path / "checkpoint/step-00000001/state.json").unlink()
    with pytest.raises(CheckpointError, match=r"is whole: .*step-00000001: cannot read state\.json"):
        newest_whole(tmp_path / "checkpoint")


# Damaged checkpoints. Each entry damages a folder; the expression is searched in the message.

EXPERT = "model.layers.0.moe.experts.down_projs.6"


def file_with(folder: Path, name: str) -> Path:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return path
    raise AssertionError(f"no file holds {name}")


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor | None], new_name: str = "") -> None:
    """Write a file again with one tensor changed, renamed, or (where `change` gives `None`) without it."""
    path = file_with(folder, name)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    changed = change(tensors.pop(name))
    sharding = json.loads(metadata["DCP_SHARDING_INFO"])
    if changed is not None:
        tensors[new_name or name] = changed
        sharding[new_name or name] = sharding[name]
    save_file(tensors, path, metadata | {"DCP_SHARDING_INFO": json.dumps(sharding)})
    edit_state(folder, lambda state: state.update(files=files_of(folder)))


def edit_state(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change it so that its checksum fits: what no damage does, but another run or program may."""
    state = parse_checked_json((folder / "state.json").read_bytes())
    change(state)
    (folder / "state.json").write_text(to_checked_json(state, lines=True))


def files_of(folder: Path) -> dict[str, Any]:
    files = folder.glob("*.safetensors")
    return {path.name: {"size": path.stat().st_size, "checksum": file_checksum(path)} for path in files}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "shard-00002-model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def overwrite_header(folder: Path) -> None:
    path = folder / "shard-00002-model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"?" * 100 + path.read_bytes()[108:])


def copy_a_file(folder: Path) -> None:
    shutil.copy(folder / "shard-00001-model-00001-of-00001.safetensors", folder / "another.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file is missing": (
        lambda folder: (folder / "shard-00002-model-00001-of-00001.safetensors").unlink(),
        r"shard-00002-model-00001-of-00001\.safetensors is missing",
    ),
    "a file is truncated": (truncate, r"shard-00002-model-00001-of-00001\.safetensors has \d+ bytes, not \d+"),
    "a header is garbage": (overwrite_header, r"cannot read shard-00002-model-00001-of-00001\.safetensors: "),
    "a file too many": (copy_a_file, r"another\.safetensors is not of this checkpoint"),
    "a file is truncated, and state.json says so": (
        lambda folder: (truncate(folder), edit_state(folder, lambda state: state.update(files=files_of(folder)))),
        r"cannot read shard-00002-model-00001-of-00001\.safetensors: ",
    ),
    "a file outside the folder": (
        lambda folder: edit_state(
            folder, lambda state: state["files"].update({"../secret.safetensors": {"size": 8, "checksum": "0" * 32}})
        ),
        r"\.\./secret\.safetensors is missing",
    ),
    "no state": (lambda folder: (folder / "state.json").unlink(), r"cannot read state\.json: .*No such file"),
    "state is no JSON": (
        lambda folder: (folder / "state.json").write_text("{'format': 1}"),
        r"cannot read state\.json: Expecting property name",
    ),
    "state is no text": (lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe{"), r"cannot read state\.json"),
    "state is endless": (
        lambda folder: (folder / "state.json").write_text("[" * 100_000),
        r"cannot read state\.json: maximum recursion",
    ),
    "state is a list": (lambda folder: (folder / "state.json").write_text("[1]"), r"state\.json has format None"),
    "another format": (
        lambda folder: edit_state(folder, lambda state: state.update(format=3)),
        r"state\.json has format 3; this version reads 2",
    ),
    "an older format": (
        lambda folder: (folder / "state.json").write_text(json.dumps({"format": 1, "step": 1, "files": {"a": 8}})),
        r"state\.json has format 1; this version reads 2",
    ),
    "a bit of a tensor": (
        lambda folder: flip(folder / "shard-00001-model-00001-of-00001.safetensors", -1),
        r"shard-00001-model-00001-of-00001\.safetensors is damaged: its checksum",
    ),
    "a bit of a header's metadata": (
        lambda folder: flip(folder / "shard-00002-model-00001-of-00001.safetensors", 40),
        r"shard-00002-model-00001-of-00001\.safetensors",
    ),
    "a bit of the state": (
        lambda folder: (folder / "state.json").write_text(
            (folder / "state.json").read_text().replace('"world_size": 2', '"world_size": 3')
        ),
        r"cannot read state\.json: it is damaged",
    ),
    "another step": (
        lambda folder: edit_state(folder, lambda state: state.update(step=2)),
        r"state\.json is of step 2",
    ),
    "files without checksums": (
        lambda folder: edit_state(folder, lambda state: state.update(files={"a": 8})),
        r"state\.json: files has 8 for a, not its size and checksum",
    ),
    "state lacks a key": (
        lambda folder: edit_state(folder, lambda state: state.pop("world_size")),
        r"state\.json: world_size is None, not of type int",
    ),
    "a key has another type": (
        lambda folder: edit_state(folder, lambda state: state.update(files=["a"])),
        r"state\.json: files is \['a'\], not of type dict",
    ),
    "a tensor is missing": (
        lambda folder: edit_tensor(folder, EXPERT, lambda tensor: None),
        rf"{re.escape(EXPERT)} is missing",
    ),
    "a moment is missing": (
        lambda folder: edit_tensor(folder, "optimizer.exp_avg_sq.head.bias", lambda tensor: None),
        r"optimizer\.exp_avg_sq\.head\.bias (is missing|holds \d values)",
    ),
    "a part of a tensor is missing": (
        lambda folder: edit_tensor(folder, "model.embed.weight", lambda tensor: None),
        r"model\.embed\.weight holds \d+ values of shape \(17, 12\), not 204 of \(17, 12\)",
    ),
    "another shape": (
        lambda folder: edit_tensor(folder, EXPERT, lambda tensor: tensor.view(6, 24).clone()),
        rf"{re.escape(EXPERT)} holds 144 values of shape \(6, 24\), not 144 of \(12, 12\)",
    ),
    "another dtype": (
        lambda folder: edit_tensor(folder, EXPERT, lambda tensor: tensor.half()),
        rf"{re.escape(EXPERT)} is torch\.float16, not torch\.float32",
    ),
    "another name": (
        lambda folder: edit_tensor(folder, EXPERT, lambda tensor: tensor, "model.else"),
        rf"{re.escape(EXPERT)} is missing; model\.else is in the checkpoint, but not in this run",
    ),
}


def save_one(folder: str) -> None:
    run = Run(folder, 2)
    run.train(1)
    run.checkpointer.save(1, {})


def load_damaged(folders: list[str]) -> list[tuple[str, bool]]:
    """For each folder: the message, and whether the run and its random state are as they were."""
    run = Run("unused", 2, seed=1)
    run.train(1)
    before, random_state = run.contents(), torch.get_rng_state()
    outcomes = []
    for folder in folders:
        message = message_of(lambda folder=folder: run.at(folder).checkpointer.load(1))
        unchanged = equal(run.contents(), before) and torch.equal(torch.get_rng_state(), random_state)
        outcomes.append((message, unchanged))
    return outcomes


@pytest.fixture(scope="module")
def whole(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of step 1, saved by two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    ranks.run(2, save_one, str(folder))
    return folder


@pytest.fixture(scope="module")
def refusals(
    whole: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[tuple[str, bool]]]:
    """What both ranks say to each damaged copy."""
    folders = []
    for damage, _ in DAMAGES.values():
        folders.append(tmp_path_factory.mktemp("damaged"))
        shutil.copytree(whole, folders[-1], dirs_exist_ok=True)
        damage(folders[-1] / "step-00000001")
        (folders[-1] / "secret.safetensors").write_bytes(b"8 bytes.")
    results = ranks.run(2, load_damaged, [str(folder) for folder in folders])
    return {name: [result[index] for result in results] for index, name in enumerate(DAMAGES)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_on_all_ranks_and_nothing_loaded(
    refusals: dict[str, list[tuple[str, bool]]], damage: str
) -> None:
    for message, unchanged in refusals[damage]:
        assert re.search(f"step-00000001: {DAMAGES[damage][1]}", message), message
        assert unchanged


def find_among_damaged(folder: str) -> dict[str, Any]:
    """Checkpoints of steps 1 to 5, the newest two and the first damaged; what a run finds, saves and keeps."""
    run = Run(folder, 2, keep_latest_k=0)
    run.train(1)
    for step in range(1, 6):
        run.checkpointer.save(step, {"step": step})
    if dist.get_rank() == 0:
        flip(Path(folder, "step-00000005/shard-00001-model-00001-of-00001.safetensors"), -1)
        (Path(folder) / "step-00000004/state.json").write_text("{}")
        flip(Path(folder, "step-00000001/shard-00002-model-00001-of-00001.safetensors"), -1)
        Path(folder, "step-00000004.damaged").mkdir()
    dist.barrier()
    found, messages = newest_whole(Path(folder))
    counters = run.checkpointer.load(found or 0, verified=True)
    again = newest_whole(Path(folder))
    run.checkpointer.keep_latest_k = 2
    run.checkpointer.save(5, {})
    return {"found": found, "messages": messages, "counters": counters, "again": again}


def test_damaged_checkpoints_are_passed_over_and_neither_counted_nor_replaced(ranks: RankPool, tmp_path: Path) -> None:
    for result in ranks.run(2, find_among_damaged, str(tmp_path)):
        assert result["found"] == 3
        assert result["counters"] == {"step": 3}
        assert result["again"] == (3, []), "what was passed over once is told once"
        newest, older = result["messages"]
        assert re.search(r"step-00000005: shard-00001.*damaged.*passed over, and is step-00000005\.damaged now", newest)
        assert re.search(r"step-00000004: state\.json.*passed over, and is step-00000004\.damaged-2 now", older)
    kept = ["step-00000003", "step-00000004.damaged", "step-00000004.damaged-2", "step-00000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "step-00000005.damaged"])


def find_without_any(folder: str) -> list[str]:
    assert newest_whole(Path(folder)) == (None, [])
    run = Run(folder, 2)
    run.train(1)
    messages = []
    for change in ({"format": 1}, {"files": {}}):
        run.checkpointer.save(1, {})
        dist.barrier()
        if dist.get_rank() == 0:
            edit_state(Path(folder, "step-00000001"), lambda state, change=change: state.update(change))
        dist.barrier()
        messages.append(message_of(lambda: newest_whole(Path(folder))))
    return messages


def test_a_run_does_not_begin_anew_where_all_checkpoints_are_damaged(ranks: RankPool, tmp_path: Path) -> None:
    for of_another_version, damaged in ranks.run(2, find_without_any, str(tmp_path)):
        assert re.search(r"state\.json has format 1; this version reads 2$", of_another_version)
        assert re.search(rf"no checkpoint in {tmp_path} is whole: .*step-00000001: shard-.* not of this", damaged)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def load_into_other_runs(folder: str) -> dict[str, str]:
    untrained = Run(folder, 2)
    smaller = Run(folder, 2, num_experts=7)
    smaller.train(1)
    return {
        "untrained": message_of(lambda: untrained.checkpointer.load(1)),
        "smaller": message_of(lambda: smaller.checkpointer.load(1)),
        "absent": message_of(lambda: smaller.checkpointer.load(2)),
    }


def test_another_run_is_refused(whole: Path, ranks: RankPool) -> None:
    for messages in ranks.run(2, load_into_other_runs, str(whole)):
        assert re.search(
            r"optimizer\.exp_avg\.embed\.weight is in the checkpoint, but not in this run", messages["untrained"]
        )
        assert re.search(r"router\.weight holds 96 values of shape \(8, 12\), not 84 of \(7, 12\)", messages["smaller"])
        assert re.search(r"step-00000002: cannot read state\.json", messages["absent"])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_planted_pickle_is_not_executed(whole: Path, ranks: RankPool, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    step = tmp_path / "run" / "step-00000001"
    assert {path.suffix for path in step.iterdir()} == {".safetensors", ".json"}
    for name in (".metadata", "__0_0.distcp", "random_state.pt"):
        (step / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    pickle.loads((step / ".metadata").read_bytes())
    assert (tmp_path / "executed").exists(), "the payload does nothing, so that the test would say nothing"
    (tmp_path / "executed").unlink()
    for message, unchanged in (result[0] for result in ranks.run(2, load_damaged, [str(tmp_path / "run")])):
        assert message == "no error"
        assert not unchanged
    assert not (tmp_path / "executed").exists()
