"""What a run reports: docs/metrics.md tells of every metric, the line for a person is short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from crossdock.train.metrics import ProgressDisplay, last_logged_step
from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets

DOC = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
REPLICAS = {"replica_bytes", "skipped_replica_bytes", "replica_overlap_seconds", "replica_wait_seconds"}
LOSSES = {"sequence_aux_loss", "batch_aux_loss", "global_aux_loss", "z_loss"}


def documented() -> list[str]:
    table = DOC.split("| name |")[1].split("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def test_the_document_names_the_metrics_that_a_run_writes(ranks: RankPool, tmp_path: Path) -> None:
    def lines(name: str, *overrides: str) -> list[dict[str, Any]]:
        arguments = (str(write_assets(tmp_path / "assets")), str(tmp_path / name), str(tmp_path / "cache"))
        settings = ["--training.steps", "2", "--training.local-batch-size", "2", *overrides]
        return ranks.run(2, run_trainer, *arguments, settings)[0]["metrics"]

    losses = [word for name in LOSSES for word in (f"--moe.{name}-coeff", "0.01")]
    replicas = ("--parallelism.data-parallel-replicate-degree", "2")
    held_out = ("--data.held-out", "0.1", "--validation.interval", "1", "--validation.max-samples", "8")
    for line in lines("all", *losses, *held_out, *replicas):
        assert sorted(line) == sorted(documented())
    for line in lines("plain"):
        assert line.keys() == set(documented()) - LOSSES - REPLICAS - {"validation_loss"}
        assert line["mfu"] is None, "on CPU"
        assert line["tflops"] > 0
        assert 0 < line["memory_percent"] <= 100
        assert line["memory_gib"] > 0.1


@pytest.mark.parametrize(
    ("on_gpu", "mfu", "shown", "hidden"),
    [
        (False, None, "0.50 GiB", "TFLOP"),
        (True, 27.96, "276.5 TFLOP/s (28.0 % MFU)  0.50 GiB", "null"),
        (True, None, "276.5 TFLOP/s  0.50 GiB", "MFU"),
    ],
)
def test_the_line_tells_of_flops_on_a_gpu(
    on_gpu: bool, mfu: float | None, shown: str, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    display = ProgressDisplay(10, 0, 1, on_gpu=on_gpu)
    numbers = {"loss": 2.5, "tokens_per_second_per_gpu": 12040.0, "tflops": 276.5, "mfu": mfu, "memory_gib": 0.5}
    display.update({"step": 1, "max_mean_load": 1.2, **numbers})
    line = capsys.readouterr().out
    assert "12,040 tok/s/rank" in line
    assert shown in line
    assert hidden not in line


def test_the_last_logged_step_counts_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_logged_step(path) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_logged_step(path) == 2
