"""Corruptions by a seeded script: every one is found and named, none ends in a traceback, none loads silently.

pytest -m "" tests/checkpoint/test_corruptions.py      all 500; some of each kind otherwise
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import Qwen3MoeForCausalLM

from crossdock.checkpoint import newest_whole
from crossdock.config import load_config, validate
from crossdock.tools.opening import find_model
from crossdock.tools.report.records import read_run
from crossdock.train.keeping import run_identity
from tests.checkpoint.corruptions import KINDS, NEWEST, OLDER, Subjects, case
from tests.checkpoint.test_recovery import take
from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets, write_hf_model

# How many of each kind: 500 in all, most of what a run depends on and what comes from elsewhere.
ALL = {
    "checkpoint": 110,
    "run settings": 40,
    "run assets": 50,
    "run logs": 50,
    "run trackers": 10,
    "run id": 10,
    "snapshots": 50,
    "user config": 100,
    "foreign weights": 90,
}
SOME = 8


@pytest.fixture(scope="module")
def subjects(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    folder = tmp_path_factory.mktemp("subjects")
    settings = ["--training.steps", str(NEWEST), "--checkpoint.interval", str(OLDER), "--metrics.load-interval", "5"]
    settings += ["--parallelism.expert-parallel-degree", "2", "--metrics.trackers", "tensorboard"]
    settings += ["--training.local-batch-size", "2", "--checkpoint.no-last-save-in-hf"]
    assets = str(write_assets(folder / "assets"))
    ranks.run(2, run_trainer, assets, str(folder / "run"), str(folder / "cache"), settings)
    run_identity(folder / "run")
    ranks.run(2, take, str(folder / "snapshots"), 2, (1, 2))
    write_hf_model(folder / "single")
    shutil.copytree(folder / "single", folder / "sharded")
    (folder / "sharded/model.safetensors").unlink()
    Qwen3MoeForCausalLM.from_pretrained(folder / "single").save_pretrained(folder / "sharded", max_shard_size="150KB")
    return Subjects(folder / "run", folder / "snapshots", folder / "single", folder / "sharded")


def check(kind: str, count: int, subjects: Subjects, tmp_path: Path) -> None:
    failures = []
    for number in range(count):
        drawn = case(kind, number, subjects)
        copy = tmp_path / f"{number}"
        if drawn.subject is not None:
            shutil.copytree(drawn.subject, copy)
        else:
            copy.mkdir()
        drawn.damage(copy)
        try:
            message = drawn.find(copy)
        except Exception:  # noqa: BLE001 (whatever it is, it is told with the others)
            message = f"TRACEBACK\n{traceback.format_exc()}"
        if not any(name in message for name in drawn.names) or message.startswith("TRACEBACK"):
            failures.append(f"{kind} {number}: {drawn.name}\n    said: {message or 'nothing'}")
        shutil.rmtree(copy)
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures)


def test_there_are_five_hundred() -> None:
    assert ALL.keys() == KINDS.keys()
    assert sum(ALL.values()) >= 500


def test_what_is_whole_is_taken_as_it_is(subjects: Subjects) -> None:
    assert newest_whole(subjects.run / "checkpoint") == (NEWEST, [])
    validate(load_config(None, ["--job.dump-folder", str(subjects.run)]), 2)
    assert read_run(subjects.run).notes == []
    for folder in (subjects.run, subjects.single, subjects.sharded):
        find_model(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_some_corruptions_are_found_and_named(kind: str, subjects: Subjects, tmp_path: Path) -> None:
    check(kind, SOME, subjects, tmp_path)


# The same through the commands: what is changed, the command, its exit code, what it says.
COMMANDS: dict[str, tuple[str, str, int, str]] = {
    "a run goes on": ("checkpoint/step-00000020/state.json", "train --job.dump-folder RUN", 0, "step-00000020.damaged"),
    "its settings": ("config.toml", "train --job.dump-folder RUN", 2, "config.toml"),
    "its assets": ("hf_assets/config.json", "train --job.dump-folder RUN", 2, "hf_assets/config.json"),
    "settings are shown": ("config.toml", "config --job.dump-folder RUN", 2, "config.toml"),
    "a checkpoint that is named": (
        "checkpoint/step-00000020/shard-00001-model-00001-of-00001.safetensors",
        "eval RUN/checkpoint/step-00000020 --data TEXT --cache-folder CACHE",
        1,
        "shard-00001-model-00001-of-00001.safetensors is damaged",
    ),
    "a run is exported": ("checkpoint/step-00000020/state.json", "export RUN OUT", 1, "state.json"),
    "a run is converted": (
        "checkpoint/step-00000020/shard-00002-model-00001-of-00001.safetensors",
        "convert RUN OUT",
        1,
        "shard-00002-model-00001-of-00001.safetensors is damaged",
    ),
    "a text is continued": ("hf_assets/tokenizer.json", "generate RUN --prompt a", 2, "hf_assets/tokenizer.json"),
    "a report is written": ("metrics.jsonl", "report RUN", 0, "report.html"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_name_what_is_damaged(
    name: str,
    subjects: Subjects,
    tmp_path: Path,
    only_rank: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, command, code, said = COMMANDS[name]
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(subjects.run, run)
    (tmp_path / "text.txt").write_text("Some text. " * 200)
    data = bytearray((run / file).read_bytes())
    data[-20] ^= 4
    (run / file).write_bytes(data)
    monkeypatch.setenv("COLUMNS", "1000")
    if command.startswith(("convert", "report", "config")):
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(variable)
    words = {"RUN": run, "OUT": out, "TEXT": tmp_path / "text.txt", "CACHE": tmp_path / "cache"}
    arguments = [str(words.get(word, word)).replace("RUN", str(run)) for word in command.split()]
    overrides = ["--training.steps", "21", "--parallelism.expert-parallel-degree", "1"]
    try:
        assert only_rank(*arguments, *(overrides if command.startswith("train") else ())) == code
    finally:
        if dist.is_initialized():  # A rank that fails leaves it to the process's end.
            dist.destroy_process_group()
    output = "".join(capfd.readouterr())
    assert said in output
    assert "Traceback" not in output
    assert not out.exists()
    if name == "a run goes on":
        assert (run / "checkpoint/step-00000021").is_dir()
        assert (run / "checkpoint/step-00000020.damaged").is_dir()
    if name == "a report is written":
        assert f"metrics.jsonl: line {NEWEST} could not be read" in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_corruptions_are_found_and_named(kind: str, subjects: Subjects, tmp_path: Path) -> None:
    check(kind, ALL[kind], subjects, tmp_path)
