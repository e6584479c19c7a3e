"""With any layout, a training run's numbers and weights are those of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.whole_runs import DOCUMENTS, compare, run_on
from tests.ranks import RankPool

FLOAT32 = ("--training.dtype", "float32")
LAYOUTS = [
    (4, {"dp_replicate": 2, "ep": 2}),
    pytest.param(8, {"dp_replicate": 2, "ep": 2}, marks=pytest.mark.slow),
    pytest.param(2, {"tp": 2}, marks=pytest.mark.slow),
    pytest.param(4, {"ep": 2}, marks=pytest.mark.slow),  # ep_shard 2
    pytest.param(4, {"cp": 2, "tp": 2, "ep": 4}, marks=pytest.mark.slow),
    (4, {"pp": 2, "ep": 2}),
    (4, {"pp": 2, "tp": 2}),
    pytest.param(8, {"pp": 2, "tp": 2, "ep": 4}, marks=pytest.mark.slow),  # and dp 2: one of everything
    (4, {"tp": 2, "ep": 4}),
    (4, {"cp": 2, "ep": 4}),
]
# Of other models, and settings beside.
OTHERS = [
    pytest.param("qwen3", DOCUMENTS, 4, {"cp": 2, "ep": 4}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", DOCUMENTS, 4, {"cp": 2, "ep": 4}, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", (), 4, {"cp": 4, "ep": 2}, marks=pytest.mark.slow),
    ("deepseek_v3", DOCUMENTS, 4, {"cp": 2, "tp": 2, "ep": 4}),
    ("gpt_oss", DOCUMENTS, 4, {"cp": 2, "tp": 2, "ep": 2}),
    pytest.param("gpt_oss", DOCUMENTS, 4, {"pp": 2, "tp": 2, "ep": 2}, marks=pytest.mark.slow),
    pytest.param("qwen2", DOCUMENTS, 4, {"tp": 2, "dp_replicate": 2}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, folder: Path) -> dict[str, Any]:
    return run_on(ranks, folder, "qwen3", 1, {})


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=str)
def test_a_run_equals_one_process(
    ranks: RankPool, folder: Path, one_process: dict[str, Any], world_size: int, layout: dict[str, int]
) -> None:
    compare(run_on(ranks, folder, "qwen3", world_size, layout), one_process)


@pytest.fixture(scope="module")
def one_process_in_float32(ranks: RankPool, folder: Path) -> dict[str, Any]:
    return run_on(ranks, folder, "qwen3", 1, {}, *FLOAT32)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (4, {"pp": 2, "ep": 2}),
        pytest.param(4, {"pp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "ep": 4}, marks=pytest.mark.slow),
        pytest.param(4, {"cp": 2, "ep": 4}, marks=pytest.mark.slow),
        pytest.param(4, {"cp": 2, "tp": 2, "ep": 4}, marks=pytest.mark.slow),
        pytest.param(4, {"dp_replicate": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"ep": 2}, marks=pytest.mark.slow),  # ep_shard 2
        pytest.param(8, {"pp": 2, "tp": 2, "ep": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_in_float32_equals_one_process(
    ranks: RankPool, folder: Path, one_process_in_float32: dict[str, Any], world_size: int, layout: dict[str, int]
) -> None:
    result = run_on(ranks, folder, "qwen3", world_size, layout, *FLOAT32)
    compare(result, one_process_in_float32, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("model", "overrides", "world_size", "layout"), OTHERS, ids=str)
def test_a_run_of_other_models_and_settings_equals_one_process(
    ranks: RankPool, folder: Path, model: str, overrides: tuple[str, ...], world_size: int, layout: dict[str, int]
) -> None:
    one_process = run_on(ranks, folder, model, 1, {}, *overrides)
    compare(run_on(ranks, folder, model, world_size, layout, *overrides), one_process)


@pytest.mark.parametrize(
    ("world_size", "layout"), [pytest.param(4, {"pp": 2, "tp": 2}, marks=pytest.mark.slow), (4, {"tp": 2, "ep": 4})]
)
def test_a_run_with_muon_equals_one_process(
    ranks: RankPool, folder: Path, world_size: int, layout: dict[str, int]
) -> None:
    muon = ("--optimizer.name=muon", "--optimizer.lr=6e-3")
    compare(run_on(ranks, folder, "qwen3", 4, layout, *muon), run_on(ranks, folder, "qwen3", 1, {}, *muon))


@pytest.mark.parametrize(
    ("world_size", "layout", "other_size", "other_layout"),
    [
        (4, {"tp": 2, "ep": 4}, 2, {"pp": 2, "tp": 1, "ep": 1}),
        pytest.param(4, {"pp": 2, "ep": 2}, 2, {"pp": 1, "ep": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"dp_replicate": 2, "ep": 2}, 4, {"tp": 2, "ep": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"ep": 2}, 4, {"cp": 2, "dp_replicate": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_layout(
    ranks: RankPool,
    folder: Path,
    one_process: dict[str, Any],
    world_size: int,
    layout: dict[str, int],
    other_size: int,
    other_layout: dict[str, int],
) -> None:
    first = run_on(ranks, folder, "qwen3", world_size, layout, "--checkpoint.interval", "5")["folder"]
    for later in ("checkpoint/step-00000010", "hf"):
        shutil.rmtree(first / later)
    compare(run_on(ranks, folder, "qwen3", other_size, other_layout, run_folder=first), one_process)
