"""Training with experts that move, have copies and are helped out is training as if nothing of this were there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.whole_runs import compare, run_on
from tests.ranks import RankPool

# The popular experts are others after every six steps.
SKEWED = ("--moe.debug-force-zipf", "1.2", "--moe.debug-force-zipf-drift", "6", "--training.steps", "20")
OFTEN = ("--balance.rebalance-interval", "4", "--balance.no-move-if-it-pays", "--balance.move-cost", "0")
SPILLING = ("--balance.no-spill-if-it-pays", "--balance.min-spilled-routes", "0")


@pytest.fixture(scope="module")
def unbalanced(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_on(ranks, tmp_path_factory.mktemp("none"), "qwen3", 4, {"ep": 4}, *SKEWED)


@pytest.mark.parametrize(
    "balance",
    [
        ("eplb", *OFTEN),
        ("spill", *SPILLING),
        ("eplb+spill", *OFTEN, *SPILLING, "--balance.copy-choice", "least_load"),
    ],
    ids=lambda balance: balance[0],
)
def test_losses_are_those_without(
    ranks: RankPool, tmp_path: Path, unbalanced: dict[str, Any], balance: tuple[str, ...]
) -> None:
    result = run_on(ranks, tmp_path, "qwen3", 4, {"ep": 4}, *SKEWED, "--balance.strategy", *balance)
    compare(result, unbalanced)
    moved = [line["moved_experts"] for line in result["metrics"] if line.get("moved_experts")]
    assert not balance[0].startswith("eplb") or len(moved) > 1, "several migrations"
    borrowed = sum(line.get("borrowed_experts", 0) for line in result["metrics"])
    assert not balance[0].endswith("spill") or borrowed > 0
    before, after = (
        sum(line[f"rank_max_mean{name}"] for line in result["metrics"][-8:]) / 8 for name in ("_before", "")
    )
    assert after < 0.9 * before
