"""`crossdock train --profile`: traces that name the parts of every layer, and change nothing that a run computes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.comm import Place
from crossdock.config import ProfilingConfig
from crossdock.train.profiling import StepProfiler
from tests.ranks import RankPool
from tests.tiny import run_trainer, speeches, write_assets

PARTS = ("router", "dispatch", "experts", "combine")
EP2 = ("--parallelism.expert-parallel-degree", "2", "--checkpoint.no-last-save-in-hf")
ROOT = Path(__file__).parents[2]
SECONDS = 180


def ranges(run: Path, step: int, rank: int) -> list[dict[str, Any]]:
    """The named ranges of a trace, in the order in which they begin."""
    with gzip.open(run / "profile_traces" / f"step-{step:08d}" / f"rank-{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation" and event["ph"] == "X"]
    return sorted(named, key=lambda event: event["ts"])


def within(events: list[dict[str, Any]], outer: str) -> list[str]:
    """Names of the ranges that lie in those of the name `outer`."""
    around = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == outer]
    assert around, outer
    return [
        event["name"]
        for event in events
        if event["name"] != outer
        and any(begin <= event["ts"] and event["ts"] + event["dur"] <= end for begin, end in around)
    ]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_trace_has_the_parts_of_every_layer_forward_and_backward(ranks: RankPool, tmp_path: Path, mode: str) -> None:
    assets = str(write_assets(tmp_path / "assets"))
    settings = ["--training.steps", "7", "--activation-checkpoint.mode", mode, *EP2]
    plain = ranks.run(2, run_trainer, assets, str(tmp_path / "plain"), str(tmp_path / "cache"), settings)
    profiling = ["--profiling.enable-profiling", "--profiling.profile-freq", "6"]
    traced = ranks.run(2, run_trainer, assets, str(tmp_path / "run"), str(tmp_path / "cache"), settings + profiling)
    assert [line["loss"] for line in plain[0]["metrics"]] == [line["loss"] for line in traced[0]["metrics"]]
    assert not (tmp_path / "plain" / "profile_traces").exists()
    folders = sorted(path.name for path in (tmp_path / "run" / "profile_traces").iterdir())
    assert folders == ["step-00000003", "step-00000006"]
    for rank in (0, 1):
        events = ranges(tmp_path / "run", 3, rank)
        forward, backward = within(events, "forward"), within(events, "backward")
        for layer in (0, 1):
            in_order = [f"{part} model.layers.{layer}.mlp" for part in PARTS]
            assert [name for name in forward if name in in_order] == in_order
            parts = [name for name in backward if name in in_order]
            if mode == "none":
                assert parts == in_order[::-1]
            assert set(parts) == set(in_order)
            # What is run again shows as such.
            assert parts.count(in_order[2]) == (1 if mode == "none" else 2)
        assert "optimizer" in {event["name"] for event in events}


def test_the_command_writes_traces(tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets")
    settings = [
        *("--model.hf-assets-path", str(assets), "--data.source", str(speeches(assets))),
        *("--data.cache-folder", str(tmp_path / "cache"), "--job.dump-folder", str(tmp_path / "run")),
        *("--training.seq-len", "32", "--training.steps", "3", "--training.tuned", "off", *EP2),
    ]
    command = [sys.executable, "-m", "crossdock", "train", *settings, "--nproc", "2", "--profile"]
    done = subprocess.run(
        command,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"step 3: trace of each rank: {tmp_path / 'run' / 'profile_traces' / 'step-00000003'}" in done.stdout
    assert {"dispatch model.layers.1.mlp", "forward"} <= {event["name"] for event in ranges(tmp_path / "run", 3, 1)}


def test_a_run_too_short_for_a_trace_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiler = StepProfiler(ProfilingConfig(enable_profiling=True), tmp_path, Place(), 0, torch.device("cpu"))
    for step in (1, 2):
        profiler.begin(step)
        profiler.end()
    profiler.close()
    assert caplog.messages == ["no trace: this start ended before its step 3, the first that is recorded"]
    assert list(tmp_path.iterdir()) == []
