"""The training loop: resuming, stopping, bad numbers, what a run folder holds."""

from __future__ import annotations

import json
import math
import shutil
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from crossdock.checkpoint import CheckpointError, latest_step, saved_world_size
from crossdock.checkpoint.dcp_writing import DCPWriter
from crossdock.config import LRSchedulerConfig, load_config, validate
from crossdock.models import token_loss
from crossdock.tools.report import read_load
from crossdock.train.optimizer import learning_rate_factor
from crossdock.train.trainer import StopSignal, Trainer, TrainingStopped
from tests.ranks import RankPool
from tests.tiny import run_trainer, speeches, write_assets

TEN_STEPS = ["--training.steps", "10", "--training.global-batch-size", "8", "--moe.expert-bias"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    write_assets(folder / "assets")
    return folder


def _train(ranks: RankPool, folder: Path, name: str, world_size: int, *overrides: str) -> dict[str, Any]:
    arguments = (str(folder / "assets"), str(folder / name), str(folder / "cache"))
    settings = [*TEN_STEPS, "--training.local-batch-size", str(8 // world_size), *overrides]
    return ranks.run(world_size, run_trainer, *arguments, settings)[0]


def _losses(result: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in result["metrics"]]


def test_resumed_run_equals_the_uninterrupted_one(ranks: RankPool, folder: Path) -> None:
    ep2 = ("--parallelism.expert-parallel-degree", "2")
    six = ("--training.steps", "6")
    in_background = ("--checkpoint.interval", "3", "--checkpoint.async-mode", "async")
    whole = _train(ranks, folder, "whole", 2, *in_background, *six, *ep2)
    for copy in ("same", "other", "wider"):
        shutil.copytree(folder / "whole", folder / copy)
        shutil.rmtree(folder / copy / "checkpoint" / "step-00000006")
    same = _train(ranks, folder, "same", 2, *six, *ep2)
    assert [line["step"] for line in same["metrics"]] == list(range(1, 7)), "steps were lost or logged twice"
    assert _losses(same) == _losses(whole), "bit for bit, at the same layout"
    assert [line["grad_norm"] for line in same["metrics"]] == [line["grad_norm"] for line in whole["metrics"]]
    np.testing.assert_array_equal(same["bias"][-1], whole["bias"][-1])
    for name, world_size, ep in (("other", 1, 1), ("wider", 4, 4)):
        other = _train(ranks, folder, name, world_size, *six, "--parallelism.expert-parallel-degree", str(ep))
        np.testing.assert_allclose(_losses(other), _losses(whole), rtol=1e-5)


def test_run_folder_holds_what_is_promised(ranks: RankPool, folder: Path) -> None:
    _train(ranks, folder, "promised", 1, "--checkpoint.interval", "3", "--checkpoint.keep-latest-k", "2")
    run = folder / "promised"
    assert tomllib.loads((run / "config.toml").read_text())["training"]["steps"] == 10
    assert sorted(path.name for path in (run / "checkpoint").iterdir()) == ["step-00000009", "step-00000010"]
    assert (run / "hf_assets" / "tokenizer.json").is_file()
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"step", "loss", "grad_norm", "lr", "tokens_per_second_per_gpu", "memory_gib", "max_mean_load"}
    assert wanted <= line.keys()
    assert line["tokens"] == 8 * 32
    assert 1 <= line["max_mean_load"] <= 4
    assert (run / "report.html").read_text().count('class="chart"') >= 6
    assert saved_world_size(run / "checkpoint", 10) == 1


def test_recorded_loads_are_the_routes_of_the_global_batch(ranks: RankPool, folder: Path) -> None:
    ep2 = ("--parallelism.expert-parallel-degree", "2")
    every_second = ("--training.steps", "6", "--metrics.load-interval", "2")
    result = _train(ranks, folder, "loads", 2, *every_second, "--checkpoint.interval", "3", *ep2)
    steps, counts, _ = read_load(folder / "loads" / "expert_load.bin")
    assert steps.tolist() == [2, 4, 6]
    assert counts.shape == (3, 2, 8)
    assert (counts.sum(axis=2) == 8 * 32 * 2).all(), "every token of the global batch takes two routes"
    worst = (counts.max(axis=2) / counts.mean(axis=2)).max(axis=1)
    np.testing.assert_allclose(worst, [line["max_mean_load"] for line in result["metrics"][1::2]])
    for line in result["metrics"]:
        assert 0 < line["bytes_within_nodes"] == line["least_bytes_within_nodes"], "of this step alone"
        # 32 values of 4 bytes; there and back, forward and backward, over two layers, at most once per token.
        assert line["bytes_within_nodes"] <= 8 * 32 * 32 * 4 * 4 * 2
        assert line["bytes_between_nodes"] == line["least_bytes_between_nodes"] == 0
        assert 0 < line["metadata_bytes"] < line["bytes_within_nodes"]
    whole = counts.copy()
    shutil.rmtree(folder / "loads" / "checkpoint" / "step-00000006")
    _train(ranks, folder, "loads", 2, *every_second, *ep2)
    steps, counts, _ = read_load(folder / "loads" / "expert_load.bin")
    assert steps.tolist() == [2, 4, 6]
    np.testing.assert_array_equal(counts, whole)


def _train_without_a_report(assets: str, run_folder: str, cache: str) -> None:
    config = _config(assets, run_folder, cache, "--metrics.load-interval", "0", "--training.steps", "2")
    trainer = Trainer(config, validate(config, 1), torch.device("cpu"), True, StopSignal())
    (Path(run_folder) / "report.html").mkdir()
    trainer.train()


def test_a_report_that_cannot_be_written_fails_no_run(ranks: RankPool, folder: Path) -> None:
    run = folder / "no-report"
    ranks.run(1, _train_without_a_report, str(folder / "assets"), str(run), str(folder / "cache"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "checkpoint" / "step-00000002").is_dir()
    assert not (run / "expert_load.bin").exists(), "load_interval = 0 records none"


def _stop_in_step(assets: str, run_folder: str, cache: str, stop_rank: int, stop_step: int) -> list[int]:
    """Ask one rank alone to stop while it is in `stop_step`; the steps whose metrics are written."""
    config = _config(assets, run_folder, cache)
    stop = StopSignal()
    dims = validate(config, dist.get_world_size())
    trainer = Trainer(config, dims, torch.device("cpu"), dist.get_rank() == 0, stop)
    calls = 0

    def ask(*_: Any) -> None:
        nonlocal calls
        calls += 1
        stop.requested = stop.requested or (calls == stop_step and dist.get_rank() == stop_rank)

    trainer.model.register_forward_pre_hook(ask)
    trainer.train()
    dist.barrier()
    return [json.loads(line)["step"] for line in Path(run_folder, "metrics.jsonl").read_text().splitlines()]


def _config(assets: str, run_folder: str, cache: str, *overrides: str) -> Any:
    settings = ["--model.hf-assets-path", assets, "--job.dump-folder", run_folder]
    settings += ["--data.source", str(speeches(assets)), "--data.cache-folder", cache]
    return load_config(
        None, [*settings, "--training.seq-len", "32", *TEN_STEPS, "--training.local-batch-size", "4", *overrides]
    )


def test_a_stop_on_one_rank_ends_all_at_the_same_step_with_a_checkpoint(ranks: RankPool, folder: Path) -> None:
    arguments = (str(folder / "assets"), str(folder / "stopped"), str(folder / "cache"))
    first, second = ranks.run(2, _stop_in_step, *arguments, 1, 4)
    assert first == second == [1, 2, 3, 4]
    assert [path.name for path in (folder / "stopped" / "checkpoint").iterdir()] == ["step-00000004"]
    resumed = _train(ranks, folder, "stopped", 2)
    assert [line["step"] for line in resumed["metrics"]] == list(range(1, 11))


def _resume(assets: str, run_folder: str, cache: str) -> str:
    config = _config(assets, run_folder, cache)
    try:
        Trainer(
            config, validate(config, dist.get_world_size()), torch.device("cpu"), dist.get_rank() == 0, StopSignal()
        )
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(ranks: RankPool, folder: Path) -> None:
    arguments = (str(folder / "assets"), str(folder / "damaged"), str(folder / "cache"))
    before = _train(ranks, folder, "damaged", 1, "--training.steps", "4", "--checkpoint.interval", "2")
    checkpoints = folder / "damaged" / "checkpoint"
    (shard,) = (checkpoints / "step-00000004").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    resumed = _train(ranks, folder, "damaged", 1, "--training.steps", "4")
    assert [(line["step"], line["loss"]) for line in resumed["metrics"]] == [
        (line["step"], line["loss"]) for line in before["metrics"]
    ], "as if it had been interrupted at step 2"
    assert (checkpoints / "step-00000004.damaged" / shard.name).read_bytes() == data
    for step in (2, 4):
        (checkpoints / f"step-{step:08d}" / "state.json").write_text("{}")
    (message,) = ranks.run(1, _resume, *arguments)
    assert f"no checkpoint in {checkpoints} is whole" in message
    assert f"{checkpoints}/step-00000004: state.json" in message


def _save_slowly(assets: str, run_folder: str, cache: str, stop_step: int, *overrides: str) -> list[str]:
    """Train until a stop is asked for in `stop_step`, with writes that take longer than steps; the checkpoints then."""
    config = _config(assets, run_folder, cache, "--checkpoint.async-mode", "async", *overrides)
    stop = StopSignal()
    trainer = Trainer(config, validate(config, dist.get_world_size()), torch.device("cpu"), dist.get_rank() == 0, stop)

    class SlowWriter(DCPWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            time.sleep(0.5)
            return super().write_data(plan, planner)

    def ask(*_: Any) -> None:
        stop.requested = trainer.step + 1 >= stop_step

    trainer.model.register_forward_pre_hook(ask)
    with mock.patch("crossdock.checkpoint.distributed.DCPWriter", SlowWriter):
        trainer.train()
    dist.barrier()
    return sorted(path.name for path in Path(run_folder, "checkpoint").iterdir())


@pytest.mark.parametrize(
    ("stop_step", "options", "kept"),
    [
        (4, ["--checkpoint.interval=2"], ["step-00000002", "step-00000004"]),
        (5, ["--checkpoint.interval=1", "--checkpoint.async-when-busy=skip"], ["step-00000001", "step-00000005"]),
    ],
)
def test_a_stop_waits_for_checkpoints_that_are_being_written(
    ranks: RankPool, folder: Path, stop_step: int, options: list[str], kept: list[str]
) -> None:
    arguments = (str(folder / "assets"), str(folder / f"slow-{stop_step}"), str(folder / "cache"))
    assert ranks.run(2, _save_slowly, *arguments, stop_step, *options) == [kept, kept]


def _bad_numbers(assets: str, run_folder: str, cache: str, bad_rank: int, bad_calls: list[int]) -> dict[str, Any]:
    """NaN in one rank's logits in some steps; weights before and after the first bad step."""
    saving = ("--checkpoint.interval", "1", "--checkpoint.async-mode", "async")
    config = _config(assets, run_folder, cache, "--fault-tolerance.max-skipped-steps", "3", *saving)
    trainer = Trainer(
        config, validate(config, dist.get_world_size()), torch.device("cpu"), dist.get_rank() == 0, StopSignal()
    )
    calls = 0
    snapshots = []

    def spoil(module: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        # The optimizer's are the shards; the model's may be gathered at this moment.
        shards = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        weights = torch.cat([p.to_local().flatten() for p in shards])
        snapshots.append(torch.cat([weights, *(layer.router.expert_bias for layer in trainer.layers)]).detach().clone())  # type: ignore[misc]
        if calls in bad_calls and dist.get_rank() == bad_rank:
            output.logits = output.logits * math.nan
        return output

    trainer.model.register_forward_hook(spoil)
    message = ""
    try:
        trainer.train()
    except TrainingStopped as error:
        message = str(error)
    unchanged = [bool(torch.equal(a, b)) for a, b in pairwise(snapshots)]
    lines = [json.loads(line) for line in Path(run_folder, "metrics.jsonl").read_text().splitlines()]
    newest = latest_step(Path(run_folder, "checkpoint"))
    return {"unchanged": unchanged, "message": message, "lines": lines, "step": trainer.step, "newest": newest}


def test_a_bad_step_is_skipped_on_all_ranks(ranks: RankPool, folder: Path) -> None:
    arguments = (str(folder / "assets"), str(folder / "nan"), str(folder / "cache"))
    results = ranks.run(2, _bad_numbers, *arguments, 1, [3, 7])
    for result in results:
        assert result["unchanged"] == [step in (3, 7) for step in range(1, 10)]
        assert result["message"] == ""
    lines = results[0]["lines"]
    assert [line["loss"] is None for line in lines] == [step in (3, 7) for step in range(1, 11)]
    assert lines[-1]["skipped_steps"] == 2


def test_bad_steps_in_a_row_stop_the_run_with_a_message(ranks: RankPool, folder: Path) -> None:
    arguments = (str(folder / "assets"), str(folder / "nans"), str(folder / "cache"))
    for result in ranks.run(2, _bad_numbers, *arguments, 0, [2, 4, 5, 6]):
        assert (result["step"], result["newest"]) == (6, 3), "the last good step's, and it is whole"
        assert "3 steps in a row" in result["message"]
        assert "max_skipped_steps" in result["message"]


def test_forced_balance_gives_every_expert_the_same_load(ranks: RankPool, folder: Path) -> None:
    result = _train(ranks, folder, "forced", 2, "--training.debug_moe_force_load_balance")
    assert [line["max_mean_load"] for line in result["metrics"]] == [1.0] * 10


def test_token_loss_leaves_masked_labels_out_and_sums_in_at_least_float32() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[0, -100, 2], [4, 4, -100]])
    expected = -sum(
        logits[b, s].log_softmax(-1)[labels[b, s]] for b in range(2) for s in range(3) if labels[b, s] != -100
    )
    torch.testing.assert_close(token_loss(logits, labels), expected)
    assert token_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_learning_rate_warms_up_stays_and_decays() -> None:
    cosine = LRSchedulerConfig(warmup_steps=10, min_lr_factor=0.1)
    factors = [learning_rate_factor(step, 100, cosine) for step in range(1, 101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(factors[9:]))
    stable = LRSchedulerConfig(warmup_steps=10, decay_ratio=0.2, decay_type="linear", min_lr_factor=0.0)
    factors = [learning_rate_factor(step, 100, stable) for step in range(1, 101)]
    assert factors[9:80] == [1.0] * 71
    assert factors[89] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.0)
    assert learning_rate_factor(1, 5, LRSchedulerConfig(warmup_steps=0)) <= 1.0


def test_a_run_resumes_when_the_folder_it_started_from_is_gone(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    for name in ("assets", "speeches"):
        shutil.copytree(folder / name, tmp_path / name)
    arguments = (str(tmp_path / "assets"), str(tmp_path / "run"), str(folder / "cache"))
    ranks.run(1, run_trainer, *arguments, ["--training.steps", "1"])
    shutil.rmtree(tmp_path / "assets")
    metrics = ranks.run(1, run_trainer, *arguments, ["--training.steps", "2"])[0]["metrics"]
    assert [line["step"] for line in metrics] == [1, 2]


def resume_on_other_text(run_folder: str, text: str, cache: str) -> str:
    settings = ["--job.dump-folder", run_folder, "--data.source", text, "--data.cache-folder", cache]
    config = load_config(None, [*settings, "--training.steps", "2", "--training.seq-len", "32"])
    try:
        dims = validate(config, 1)
        Trainer(config, dims, torch.device("cpu"), True, StopSignal()).train()
    except TrainingStopped as error:
        return str(error)
    return ""


def test_a_run_does_not_go_on_with_another_text(ranks: RankPool, tmp_path: Path) -> None:
    text, arguments = (
        tmp_path / "text.txt",
        (str(tmp_path / "run"), str(tmp_path / "text.txt"), str(tmp_path / "cache")),
    )
    text.write_text("The experts of this house are many, and each has its say. " * 200)
    assert ranks.run(1, resume_on_other_text, *arguments)[0] == ""
    settings = (tmp_path / "run" / "config.toml").read_bytes()
    text.write_text("Quite another text, with words that were not there before; numbers like 1234567. " * 200)
    refused = ranks.run(1, resume_on_other_text, *arguments)[0]
    assert str(text) in refused
    assert "another tokenizer" in refused
    assert (tmp_path / "run" / "config.toml").read_bytes() == settings


def test_a_start_that_fails_leaves_no_settings_behind(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    arguments = (str(folder / "assets"), str(tmp_path / "first"), str(folder / "cache"))
    ranks.run(1, run_trainer, *arguments, ["--training.steps", "1"])
    start = ["--training.steps", "1", "--checkpoint.initial-load-path", str(tmp_path / "first")]
    arguments = (arguments[0], str(tmp_path / "second"), arguments[2])
    with pytest.raises(AssertionError, match="expert_bias is missing"):
        ranks.run(1, run_trainer, *arguments, [*start, "--moe.expert-bias"])
    assert not (tmp_path / "second" / "config.toml").exists()
    assert len(ranks.run(1, run_trainer, *arguments, start)[0]["metrics"]) == 1
