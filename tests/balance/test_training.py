"""Training with experts that move, have copies and are helped out is training as if nothing of this were there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
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
        pytest.param(("eplb", *OFTEN), marks=pytest.mark.slow),
        pytest.param(("spill", *SPILLING), marks=pytest.mark.slow),
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


BOTH = ("--balance.strategy", "eplb+spill", *OFTEN, *SPILLING)


@pytest.mark.parametrize("ep", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_a_checkpoint_between_two_migrations_resumes(
    ranks: RankPool, tmp_path: Path, unbalanced: dict[str, Any], ep: int
) -> None:
    saved = (*SKEWED, *BOTH, "--checkpoint.interval", "10")
    first = run_on(ranks, tmp_path, "qwen3", 4, {"ep": 4}, *saved)["folder"]
    for later in ("checkpoint/step-00000020", "hf"):
        shutil.rmtree(first / later)
    compare(run_on(ranks, tmp_path, "qwen3", 4, {"ep": ep}, *saved, run_folder=first), unbalanced)


def test_losses_are_those_without_in_float32(ranks: RankPool, tmp_path: Path) -> None:
    single = (*SKEWED, "--training.dtype", "float32")
    ours, theirs = (
        [line["loss"] for line in run_on(ranks, tmp_path, "qwen3", 4, {"ep": 4}, *single, *balance)["metrics"]]
        for balance in (BOTH, ())
    )
    assert len(ours) == 20
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "world_size", "layout", "settings"),
    [
        pytest.param("qwen3", 4, {"pp": 2, "ep": 2}, ("--training.global-batch-size", "16"), id="pp"),
        pytest.param("qwen3", 4, {"dp_replicate": 2, "ep": 2}, (), id="replicas", marks=pytest.mark.slow),
        pytest.param("gpt_oss", 2, {"ep": 2}, ("--activation-checkpoint.mode", "selective"), id="gpt-oss-biases"),
        pytest.param("qwen3", 4, {"ep": 2}, ("--optimizer.name", "muon"), id="muon-ep-shard"),
    ],
)
def test_other_layouts_models_and_optimizers(
    ranks: RankPool, tmp_path: Path, model: str, world_size: int, layout: dict[str, int], settings: tuple[str, ...]
) -> None:
    drifting = ("--moe.debug-force-zipf", "1.2", "--moe.debug-force-zipf-drift", "3", *settings)
    moving = ("--balance.rebalance-interval", "2", *OFTEN[2:], *SPILLING)
    balanced = run_on(
        ranks, tmp_path, model, world_size, layout, *drifting, "--balance.strategy", "eplb+spill", *moving
    )
    compare(balanced, run_on(ranks, tmp_path, model, world_size, layout, *drifting))
    assert sum(line.get("moved_experts", 0) for line in balanced["metrics"]) > 0
