"""The rank that the others wait for is named, with how much longer it works and in which phase."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from crossdock.comm.work_profile import find_straggler
from crossdock.config import load_config
from crossdock.experts import GroupedExperts
from crossdock.train.launch import train_rank
from tests.faults import run_processes
from tests.tiny import speeches, write_assets


def test_the_slowest_rank_is_compared_with_the_median_of_the_others() -> None:
    work = {
        0: {"forward": 1.0, "backward": 2.0},
        1: {"forward": 1.0, "backward": 2.0},
        2: {"forward": 2.5, "backward": 2.3, "data": 0.2},
    }
    straggler = find_straggler(work)
    assert straggler is not None
    assert (straggler.rank, straggler.phase) == (2, "forward")
    assert (straggler.ratio, straggler.seconds) == pytest.approx((5 / 3, 2.0))
    assert str(straggler).startswith("rank 2 works 1.67 times as long as the median of the others, 2 s more per step")
    assert find_straggler({0: {"forward": 1.0}}) is None
    assert find_straggler({0: {}, 1: {}}) is None


def train_with_slow_experts(folder: str) -> int:
    """A run of the real trainer; on rank 1 the experts take longer than all else."""
    config = load_config(
        None,
        [
            *("--job.dump-folder", f"{folder}/run"),
            *("--model.hf-assets-path", f"{folder}/assets"),
            *("--data.source", str(speeches(f"{folder}/assets")), "--data.cache-folder", f"{folder}/cache"),
            *("--training.seq-len", "32", "--training.local-batch-size", "2", "--training.steps", "60"),
            *("--parallelism.expert-parallel-degree", "2", "--training.tuned", "off"),
            *("--fault-tolerance.straggler-interval", "5"),
        ],
    )

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, GroupedExperts) and os.environ["RANK"] == "1":
            time.sleep(0.15)

    nn.modules.module.register_module_forward_hook(after)
    return train_rank(config, os.environ)


def test_a_rank_that_stays_slow_is_warned_of_with_its_phase_and_is_in_the_metrics(tmp_path: Path) -> None:
    write_assets(tmp_path / "assets")
    ranks = run_processes(2, train_with_slow_experts, str(tmp_path), folder=tmp_path)
    assert [code for code, _ in ranks] == [0, 0], ranks
    said = ranks[0].output
    assert "rank 1 works " in said
    assert "most of it in forward experts" in said
    assert '"slowest_rank": 1' in (tmp_path / "run/metrics.jsonl").read_text()
    assert '"slowest_rank_ratio": ' in (tmp_path / "run/metrics.jsonl").read_text()
