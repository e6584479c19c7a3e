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
RANKS = {"rank_max_mean_before", "rank_max_mean", "worst_rank_max_mean", "imbalance_seconds"}
MOVES = {"predicted_rank_max_mean", "moved_experts", "moved_bytes", "move_seconds"}
BALANCE = {"node_max_mean", "borrowed_experts"} | MOVES
WATCHED = {"slowest_rank", "slowest_rank_ratio"}  # by a watchdog, which has a test of its own
GROUPS = {"replica_groups", "stall_seconds"}  # tests/integrations/test_torchft.py
LOSSES = {"sequence_aux_loss", "batch_aux_loss", "global_aux_loss", "z_loss"}


def documented() -> list[str]:
    table = DOC.split("| name |")[1].split("\n\n")[0]
    names = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert set(names) >= WATCHED | GROUPS
    return [name for name in names if name not in WATCHED | GROUPS]


def test_the_document_names_the_metrics_that_a_run_writes(ranks: RankPool, tmp_path: Path) -> None:
    def lines(name: str, world_size: int, *overrides: str) -> list[dict[str, Any]]:
        arguments = (str(write_assets(tmp_path / "assets")), str(tmp_path / name), str(tmp_path / "cache"))
        settings = ["--training.steps", "2", "--training.local-batch-size", "2", *overrides]
        return ranks.run(world_size, run_trainer, *arguments, settings)[0]["metrics"]

    losses = [word for name in LOSSES for word in (f"--moe.{name}-coeff", "0.01")]
    replicas = ("--parallelism.data-parallel-replicate-degree", "2")
    held_out = ("--data.held-out", "0.1", "--validation.interval", "1", "--validation.max-samples", "8")
    ep2 = ("--parallelism.expert-parallel-degree", "2")
    nodes = (*ep2, "--moe.ranks-per-node", "1", "--balance.strategy", "eplb+spill", "--balance.rebalance-interval", "2")
    first, second = lines("all", 4, *losses, *held_out, *replicas, *nodes)
    assert sorted(second) == sorted(documented())
    assert second.keys() - first.keys() == MOVES, "these are of steps with a look at the placement"
    for line in lines("ranks", 2, *ep2):
        assert line.keys() == set(documented()) - LOSSES - REPLICAS - BALANCE - {"validation_loss"}
    for line in lines("plain", 2):
        assert line.keys() == set(documented()) - LOSSES - REPLICAS - RANKS - BALANCE - {"validation_loss"}
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


def test_the_line_tells_of_ranks_before_and_after_relief(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"loss": 2.5, "tokens_per_second_per_gpu": 12040.0, "memory_gib": 0.5, "max_mean_load": 3.12}
    display = ProgressDisplay(10, 0, 1, on_gpu=False)
    for step, relief in enumerate([{}, {"rank_max_mean_before": 2.56, "rank_max_mean": 2.56}, {"rank_max_mean": 1.03}]):
        numbers |= relief
        display.update({"step": step + 1, **numbers})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("max/mean load ")[2].removesuffix("  0 s left") for line in lines] == [
        "3.12",
        "3.12, of ranks 2.56",
        "3.12, of ranks 2.56 > 1.03",
    ]


def test_the_last_logged_step_counts_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_logged_step(path) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_logged_step(path) == 2
