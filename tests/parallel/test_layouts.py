"""With any layout, a training run's numbers and weights are those of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.models.tiny_families import write_config
from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets

GLOBAL_BATCH = 8
DEGREES = {
    "pp": "pipeline-parallel-degree",
    "dp_replicate": "data-parallel-replicate-degree",
    "cp": "context-parallel-degree",
    "tp": "tensor-parallel-degree",
    "ep": "expert-parallel-degree",
}
LAYOUTS = [
    (4, {"dp_replicate": 2, "ep": 2}),
    pytest.param(8, {"dp_replicate": 2, "ep": 2}, marks=pytest.mark.slow),
    pytest.param(2, {"tp": 2}, marks=pytest.mark.slow),
    (4, {"tp": 2, "ep": 4}),
    (4, {"cp": 2, "ep": 4}),
]
# Rows of several documents that do not see each other, with padding at their ends.
DOCUMENTS = ("--data.packing", "documents", "--data.attend-within-documents")
# Of other models, and settings beside.
OTHERS = [
    pytest.param("qwen3", DOCUMENTS, 4, {"cp": 2, "ep": 4}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", DOCUMENTS, 4, {"cp": 2, "ep": 4}, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", (), 4, {"cp": 4, "ep": 2}, marks=pytest.mark.slow),
    ("deepseek_v3", DOCUMENTS, 4, {"cp": 2, "tp": 2, "ep": 4}),
    ("gpt_oss", DOCUMENTS, 4, {"cp": 2, "tp": 2, "ep": 2}),
    pytest.param("qwen2", DOCUMENTS, 4, {"tp": 2, "dp_replicate": 2}, marks=pytest.mark.slow),
]


def _run(
    ranks: RankPool,
    folder: Path,
    model: str,
    world_size: int,
    layout: dict[str, int],
    *overrides: str,
    run_folder: Path | None = None,
) -> dict[str, Any]:
    """Ten steps of a family's tiny model, with accumulation; the export beside the results of all ranks."""
    readers = world_size // (layout.get("pp", 1) * layout.get("cp", 1) * layout.get("tp", 1))
    settings = [
        *("--training.dtype", "float64"),
        *("--training.global-batch-size", str(GLOBAL_BATCH)),
        *("--training.local-batch-size", str(max(GLOBAL_BATCH // readers // 2, 1))),
        *("--training.steps", "10", "--lr-scheduler.warmup-steps", "3"),
        *("--data.held-out", "0.1", "--validation.interval", "10", "--validation.max-samples", "8"),
        *("--model.name", model),
        *("--moe.sequence-aux-loss-coeff", "0.01", "--moe.z-loss-coeff", "0.001"),
        *("--moe.expert-bias", "--moe.expert-bias-rate", "0.01"),
        *(part for name, degree in layout.items() for part in (f"--parallelism.{DEGREES[name]}", str(degree))),
        *overrides,
    ]
    assets = _assets(folder, model)
    run_folder = run_folder or folder / f"run-{len(list(folder.iterdir()))}"
    results = ranks.run(world_size, run_trainer, str(assets), str(run_folder), str(folder / "cache"), settings)
    weights: dict[str, np.ndarray] = {}
    for file in (run_folder / "hf").glob("*.safetensors"):
        weights |= load_file(file)
    return {"folder": run_folder, "ranks": results, "metrics": results[0]["metrics"], "weights": weights}


def _assets(folder: Path, model: str) -> Path:
    """A model's configuration and tokenizer; of Qwen3-MoE one with a single key head."""
    assets = write_assets(folder / "assets")
    if model == "qwen3":
        return assets
    write_config(folder / model, model, vocab_size=260, num_hidden_layers=2)
    shutil.copy(assets / "tokenizer.json", folder / model)
    return folder / model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, folder: Path) -> dict[str, Any]:
    return _run(ranks, folder, "qwen3", 1, {})


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=str)
def test_a_run_equals_one_process(
    ranks: RankPool, folder: Path, one_process: dict[str, Any], world_size: int, layout: dict[str, int]
) -> None:
    _compare(_run(ranks, folder, "qwen3", world_size, layout), one_process)


@pytest.mark.parametrize(("model", "overrides", "world_size", "layout"), OTHERS, ids=str)
def test_a_run_of_other_models_and_settings_equals_one_process(
    ranks: RankPool, folder: Path, model: str, overrides: tuple[str, ...], world_size: int, layout: dict[str, int]
) -> None:
    one_process = _run(ranks, folder, model, 1, {}, *overrides)
    _compare(_run(ranks, folder, model, world_size, layout, *overrides), one_process)


@pytest.mark.parametrize(
    ("world_size", "layout"), [pytest.param(4, {"ep": 2}, marks=pytest.mark.slow), (4, {"tp": 2, "ep": 4})]
)
def test_a_run_with_muon_equals_one_process(
    ranks: RankPool, folder: Path, world_size: int, layout: dict[str, int]
) -> None:
    muon = ("--optimizer.name=muon", "--optimizer.lr=6e-3")
    _compare(_run(ranks, folder, "qwen3", 4, layout, *muon), _run(ranks, folder, "qwen3", 1, {}, *muon))


@pytest.mark.parametrize(
    ("world_size", "layout", "other_size", "other_layout"),
    [
        (4, {"tp": 2, "ep": 4}, 2, {"ep": 2}),
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
    first = _run(ranks, folder, "qwen3", world_size, layout, "--checkpoint.interval", "5")["folder"]
    for later in ("checkpoint/step-00000010", "hf"):
        shutil.rmtree(first / later)
    _compare(_run(ranks, folder, "qwen3", other_size, other_layout, run_folder=first), one_process)


def _compare(result: dict[str, Any], one_process: dict[str, Any]) -> None:
    for name in ("loss", "grad_norm", "sequence_aux_loss", "z_loss", "max_mean_load"):
        ours, theirs = ([line[name] for line in each["metrics"]] for each in (result, one_process))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, err_msg=name)
    validated = [each["metrics"][-1]["validation_loss"] for each in (result, one_process)]
    assert validated[0] == pytest.approx(validated[1], rel=1e-9)
    assert result["weights"].keys() == one_process["weights"].keys()
    for name, value in one_process["weights"].items():
        np.testing.assert_allclose(result["weights"][name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    seen: dict[str, str] = {}
    for rank in result["ranks"]:
        for name, digest in rank["digests"].items():
            # Other names may be other experts.
            assert ".experts." in name or seen.setdefault(name, digest) == digest, f"ranks differ in {name}"
    losses = [line["loss"] for line in result["metrics"]]
    assert losses[-1] < losses[0] - 0.5, "the run did not learn"
