"""`training.deterministic`: two runs are equal bit by bit, and what could not be is refused (docs/numbers.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crossdock.config import Config, ConfigError, check_settings, load_config
from tests.ranks import RankPool
from tests.tiny import run_trainer, speeches, write_assets

# Of metrics.jsonl, what is time or memory, or hangs on it; so are all seconds.
MEASURED = {
    "checksum",
    "slowest_rank",
    "slowest_rank_ratio",
    "memory_gib",
    "memory_percent",
    "tokens_per_second_per_gpu",
    "tflops",
}
SETTINGS = [
    *("--training.deterministic", "--training.steps", "12", "--training.local-batch-size", "2"),
    *("--parallelism.expert-parallel-degree", "2", "--moe.expert-bias", "--moe.input-jitter", "0.1"),
    *("--balance.strategy", "eplb+spill", "--balance.rebalance-interval", "3", "--balance.min-gain", "0"),
    *("--balance.no-move-if-it-pays", "--balance.no-spill-if-it-pays", "--balance.min-spilled-routes", "1"),
    *("--checkpoint.interval", "2", "--checkpoint.async-mode", "async", "--checkpoint.no-last-save-in-hf"),
    *("--training.tuned", "auto"),
]


def computed(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in MEASURED and not k.endswith("_seconds")} for line in metrics]


def test_two_runs_are_bit_equal(ranks: RankPool, tmp_path: Path) -> None:
    """On 2 expert-parallel ranks, with migration, borrowed experts, jitter and checkpoints in the background."""
    assets = write_assets(tmp_path / "assets")

    def run(name: str) -> list[dict[str, Any]]:
        return ranks.run(2, run_trainer, str(assets), str(tmp_path / name), str(tmp_path / "cache"), SETTINGS)

    first, second = run("first"), run("second")
    ranks.run(2, torch.use_deterministic_algorithms, False)  # for the tests that borrow these ranks next
    for ours, theirs in zip(first, second, strict=True):
        assert ours["digests"] == theirs["digests"]
        assert (ours["bias"] == theirs["bias"]).all()
        assert (ours["expert_ids"] == theirs["expert_ids"]).all()
        assert computed(ours["metrics"]) == computed(theirs["metrics"])
    lines = first[0]["metrics"]
    assert sum(line.get("moved_experts", 0) for line in lines) > 0
    assert sum(line["borrowed_experts"] for line in lines) > 0
    files = [path.relative_to(tmp_path / "first") for path in sorted((tmp_path / "first").rglob("*.safetensors"))]
    assert files
    for name in files:
        ours, theirs = (load_file(tmp_path / run / name) for run in ("first", "second"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in ours)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["--balance.strategy", "eplb"], "balance.move_if_it_pays"),
        (["--balance.strategy", "spill"], "balance.spill_if_it_pays"),
        (["--balance.strategy", "auto", "--balance.no-move-if-it-pays"], "balance.spill_if_it_pays"),
    ],
)
def test_what_decides_by_measured_time_is_refused(settings: list[str], field: str) -> None:
    check_settings(load_config(None, settings))
    with pytest.raises(ConfigError) as refused:
        check_settings(load_config(None, [*settings, "--training.deterministic"]))
    assert refused.value.field == field
    assert "training.deterministic" in refused.value.valid


def _on_a_gpu(monkeypatch: pytest.MonkeyPatch, *settings: str) -> Config:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return load_config(None, [*settings, "--training.deterministic", "--training.dtype", "bfloat16"])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (["--moe.dispatcher", "auto"], "moe.dispatcher"),
        (["--moe.dispatcher", "alltoall", "--compile.enable", "--compile.backend", "eager"], "compile.enable"),
        (
            ["--moe.dispatcher", "alltoall", "--model.attn-implementation", "flash_attention_2"],
            "model.attn_implementation",
        ),
    ],
)
def test_on_a_gpu_kernels_without_a_fixed_order_are_refused(
    settings: list[str], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_settings(_on_a_gpu(monkeypatch, *settings))
    assert refused.value.field == field
    assert "training.deterministic" in refused.value.valid


def test_a_rank_tells_cublas_and_what_the_cache_has_measured_is_left(
    only_rank: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]  # monkeypatch puts back what was there before
    tuned = Path(os.environ["XDG_CACHE_HOME"], "crossdock", "tuned.json")
    tuned.parent.mkdir(parents=True)
    tuned.write_text(json.dumps("damaged"))
    assets = write_assets(tmp_path / "assets")
    common = ["--model.hf-assets-path", assets, "--data.source", speeches(assets), "--training.seq-len", "32"]
    common += ["--data.cache-folder", tmp_path / "cache", "--training.steps", "1", "--training.local-batch-size", "2"]
    assert only_rank("train", *common, "--job.dump-folder", tmp_path / "run", "--training.deterministic") == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "tuned" not in capfd.readouterr().out
    assert only_rank("train", *common, "--job.dump-folder", tmp_path / "plain") == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert "tuned: nothing taken" in capfd.readouterr().out
