"""With any layout, the numbers are those of one process: whole training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets

GLOBAL_BATCH = 8
# (ranks, ep); ep_shard is their quotient
LAYOUTS = [(2, 1), (2, 2), (4, 2), pytest.param(4, 4, marks=pytest.mark.slow), (8, 4)]
BALANCE = [
    *("--moe.sequence-aux-loss-coeff", "0.01"),
    *("--moe.z-loss-coeff", "0.001"),
    "--moe.expert-bias",
    *("--moe.expert-bias-rate", "0.01"),
]


def _run(ranks: RankPool, folder: Path, world_size: int, ep: int, *overrides: str) -> list[dict[str, Any]]:
    settings = [
        *("--training.local-batch-size", str(GLOBAL_BATCH // world_size)),
        *("--parallelism.expert-parallel-degree", str(ep)),
        *("--training.steps", "10", "--lr-scheduler.warmup-steps", "3"),
        *BALANCE,
        *overrides,
    ]
    assets = write_assets(folder / "assets")
    run_folder = folder / f"{world_size}-{ep}-{len(list(folder.iterdir()))}"
    return ranks.run(world_size, run_trainer, str(assets), str(run_folder), str(folder / "cache"), settings)


def _series(results: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([line[name] for line in results[0]["metrics"]])


def _tokens(results: list[dict[str, Any]], name: str) -> np.ndarray:
    """Per-token records `[steps, L, T, ...]` of all ranks, in the order of the global batch."""
    return np.concatenate([result[name] for result in results], axis=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trajectories")


@pytest.fixture(scope="module")
def float64_reference(ranks: RankPool, folder: Path) -> list[dict[str, Any]]:
    return _run(ranks, folder, 1, 1, "--training.dtype", "float64")


@pytest.fixture(scope="module")
def float32_reference(ranks: RankPool, folder: Path) -> list[dict[str, Any]]:
    return _run(ranks, folder, 1, 1)


@pytest.mark.parametrize(("world_size", "ep"), LAYOUTS)
def test_float64_trajectory_equals_one_process(
    ranks: RankPool, folder: Path, float64_reference: list[dict[str, Any]], world_size: int, ep: int
) -> None:
    results = _run(ranks, folder, world_size, ep, "--training.dtype", "float64")
    for name in ("loss", "grad_norm", "sequence_aux_loss", "z_loss"):
        np.testing.assert_allclose(_series(results, name), _series(float64_reference, name), rtol=1e-9)
    np.testing.assert_array_equal(_tokens(results, "expert_ids"), _tokens(float64_reference, "expert_ids"))
    for result in results:
        np.testing.assert_array_equal(result["bias"], results[0]["bias"])
    np.testing.assert_array_equal(results[0]["bias"], float64_reference[0]["bias"])
    assert np.abs(results[0]["bias"][-1]).max() > 0.05, "the bias did not move under FSDP"
    losses = _series(results, "loss")
    assert losses[-1] < losses[0] - 0.5, "the run did not learn"


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "selective"])
def test_recompute_and_accumulation_change_nothing(
    ranks: RankPool, folder: Path, float64_reference: list[dict[str, Any]], mode: str
) -> None:
    results = _run(
        ranks,
        folder,
        2,
        2,
        *("--training.dtype", "float64"),
        *("--training.local-batch-size", "1", "--training.global-batch-size", str(GLOBAL_BATCH)),
        *("--activation-checkpoint.mode", mode),
    )
    for name in ("loss", "grad_norm", "sequence_aux_loss", "z_loss", "max_mean_load"):
        np.testing.assert_allclose(_series(results, name), _series(float64_reference, name), rtol=1e-9)
    np.testing.assert_array_equal(results[0]["bias"][-1], float64_reference[0]["bias"][-1])


@pytest.mark.parametrize(("world_size", "ep"), [pytest.param(2, 2, marks=pytest.mark.slow), (4, 2), (4, 4)])
def test_float32_trajectory_equals_one_process_until_a_near_tie_flips(
    ranks: RankPool, folder: Path, float32_reference: list[dict[str, Any]], world_size: int, ep: int
) -> None:
    reference, results = float32_reference, _run(ranks, folder, world_size, ep)
    differs = (_tokens(results, "expert_ids") != _tokens(reference, "expert_ids")).any(axis=-1)  # [steps, L, T]
    flipped = differs.any(axis=(1, 2))
    agreeing = int(flipped.argmax()) if flipped.any() else len(flipped)
    if flipped.any():
        step = differs[agreeing]
        first_layer = int(step.any(axis=-1).argmax())
        margins = _tokens(reference, "margins")[agreeing, first_layer][step[first_layer]]
        assert margins.max() < 1e-4, f"step {agreeing}: experts differ where the scores are not close"
    assert agreeing >= 5, "too few steps to compare"
    for name in ("loss", "grad_norm"):
        ours, theirs = _series(results, name)[:agreeing], _series(reference, name)[:agreeing]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_bfloat16_learns(ranks: RankPool, folder: Path, float32_reference: list[dict[str, Any]]) -> None:
    results = _run(ranks, folder, 2, 2, "--training.dtype", "bfloat16")
    np.testing.assert_allclose(_series(results, "loss"), _series(float32_reference, "loss"), rtol=2e-2)
    assert _series(results, "loss")[-1] < _series(results, "loss")[0] - 0.5
