"""Corruptions by a seeded script: every one is found and named, none ends in a traceback, none loads silently.

pytest --slow tests/checkpoint/test_corruptions.py      all 500; some of each kind otherwise
"""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path

import pytest
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_corruptions_are_found_and_named(kind: str, subjects: Subjects, tmp_path: Path) -> None:
    check(kind, ALL[kind], subjects, tmp_path)
