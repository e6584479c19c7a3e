"""Whole training runs on a layout, and their comparison with one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.models.tiny_families import write_config
from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets

__all__ = ["DOCUMENTS", "compare", "run_on"]

# Rows of several documents that do not see each other, with padding at their ends.
DOCUMENTS = ("--data.packing", "documents", "--data.attend-within-documents")
GLOBAL_BATCH = 8
DEGREES = {
    "pp": "pipeline-parallel-degree",
    "dp_replicate": "data-parallel-replicate-degree",
    "cp": "context-parallel-degree",
    "tp": "tensor-parallel-degree",
    "ep": "expert-parallel-degree",
}


def run_on(
    ranks: RankPool,
    folder: Path,
    model: str,
    world_size: int,
    layout: dict[str, int],
    *overrides: str,
    num_layers: int = 2,
    run_folder: Path | None = None,
    function: Callable[..., Any] = run_trainer,
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
    assets = _assets(folder, model, num_layers)
    run_folder = run_folder or folder / f"run-{len(list(folder.iterdir()))}"
    results = ranks.run(world_size, function, str(assets), str(run_folder), str(folder / "cache"), settings)
    weights: dict[str, np.ndarray] = {}
    for file in (run_folder / "hf").glob("*.safetensors"):
        weights |= load_file(file)
    return {"folder": run_folder, "ranks": results, "metrics": results[0]["metrics"], "weights": weights}


def _assets(folder: Path, model: str, num_layers: int) -> Path:
    """A model's configuration and tokenizer; of Qwen3-MoE one with a single key head."""
    assets = write_assets(folder / f"assets-{num_layers}", num_attention_heads=4, num_hidden_layers=num_layers)
    if model == "qwen3":
        return assets
    named = folder / f"{model}-{num_layers}"
    write_config(named, model, vocab_size=260, num_hidden_layers=num_layers)
    shutil.copy(assets / "tokenizer.json", named)
    return named


def compare(result: dict[str, Any], one_process: dict[str, Any], rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Losses, norms, loads and exported weights are those of one process; what ranks have in common is bit-equal."""
    for name in ("loss", "grad_norm", "sequence_aux_loss", "z_loss", "max_mean_load"):
        ours, theirs = ([line[name] for line in each["metrics"]] for each in (result, one_process))
        np.testing.assert_allclose(ours, theirs, rtol=rtol, err_msg=name)
    validated = [each["metrics"][-1]["validation_loss"] for each in (result, one_process)]
    assert validated[0] == pytest.approx(validated[1], rel=rtol)
    assert result["weights"].keys() == one_process["weights"].keys()
    for name, value in one_process["weights"].items():
        np.testing.assert_allclose(result["weights"][name], value, rtol=rtol, atol=atol, err_msg=name)
    seen: dict[str, str] = {}
    for rank in result["ranks"]:
        for name, digest in rank["digests"].items():
            # Other names may be other experts.
            assert ".experts." in name or seen.setdefault(name, digest) == digest, f"ranks differ in {name}"
    losses = [line["loss"] for line in result["metrics"]]
    assert losses[-1] < losses[0] - 0.5, "the run did not learn"
