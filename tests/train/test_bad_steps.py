"""The policy for NaN, infinity and spikes of loss and gradient norm: skip, roll back, stop (docs/numbers.md)."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock.config import FaultToleranceConfig, load_config, validate
from crossdock.train.bad_steps import BadSteps
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer, TrainingStopped
from tests.ranks import RankPool
from tests.tiny import digests, speeches, write_assets

FOLDER = Path("run/checkpoint")
EP2 = ("--parallelism.expert-parallel-degree", "2", "--moe.expert-bias")


@dataclass
class Run:
    step: int = 0
    samples: int = 0


def policy(**settings: Any) -> BadSteps:
    return BadSteps(FaultToleranceConfig(**settings), FOLDER)


def nothing_there() -> int | None:
    return None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_a_step_is_bad_where_loss_or_norm_is_not_finite(loss: float, norm: float) -> None:
    steps = policy()
    assert steps.applies(1, 2.0, 1.0)
    assert not steps.applies(2, loss, norm)
    assert "step is skipped" in steps.settle(Run(2), nothing_there)
    assert steps.metrics() == {"skipped_steps": 1, "spikes": 0, "rollbacks": 0, "passed_over_samples": 0}


def test_a_spike_is_above_a_multiple_of_the_median_of_the_last_steps_that_were_applied() -> None:
    steps = policy(on_spike="skip", loss_spike_factor=2, norm_spike_factor=3, spike_window=5, max_skipped_steps=1000)
    generator = random.Random(0)
    losses: list[float] = []
    norms: list[float] = []
    spikes = 0
    for step in range(1, 400):
        loss, norm = generator.lognormvariate(1, 0.5), generator.lognormvariate(0, 0.7)
        is_spike = len(losses) >= 5 and (
            loss > 2 * statistics.median(losses[-5:]) or norm > 3 * statistics.median(norms[-5:])
        )
        assert steps.applies(step, loss, norm) is not is_spike
        spikes += is_spike
        if not is_spike:
            losses.append(loss)
            norms.append(norm)
    assert steps.metrics()["spikes"] == steps.metrics()["skipped_steps"] == spikes > 20


def test_a_factor_of_zero_leaves_that_number_alone() -> None:
    steps = policy(on_spike="skip", loss_spike_factor=0, spike_window=2)
    for step in (1, 2):
        assert steps.applies(step, 1.0, 1.0)
    assert steps.applies(3, 1e9, 1.0)
    assert not steps.applies(4, 1.0, 11.0)
    assert "gradient norm 11 is more than 10 times the median 1 of the last 2 steps" in steps.settle(
        Run(4), nothing_there
    )


def test_a_resumed_run_decides_alike() -> None:
    generator = random.Random(1)
    settings: dict[str, Any] = {"on_spike": "skip", "spike_window": 7, "max_skipped_steps": 4}
    numbers = [(generator.lognormvariate(0, 0.6), generator.choice([1.0, 2.0, 15.0, math.nan])) for _ in range(120)]

    def decide(steps: BadSteps, first: int) -> list[Any]:
        decided: list[Any] = []
        for step, (loss, norm) in enumerate(numbers[first:], start=first + 1):
            decided.append(steps.applies(step, loss, norm))
            try:
                decided.append(steps.settle(Run(step), nothing_there))
            except TrainingStopped as stopped:
                return [*decided, str(stopped)]
        return decided

    whole = policy(**settings)
    for count in range(len(numbers)):
        resumed = policy(**settings)
        resumed.restore(json.loads(json.dumps(whole.state())))
        uninterrupted = policy(**settings)
        uninterrupted.restore(whole.state())
        assert decide(resumed, count) == decide(uninterrupted, count)
        assert resumed.state() == uninterrupted.state()
        whole.applies(count + 1, *numbers[count])
    assert whole.state()["usual_losses"], "the windows were kept"


def test_rollbacks_in_a_row_are_limited_and_one_that_got_further_is_none_in_a_row() -> None:
    steps, run = policy(on_bad_step="rollback", max_rollbacks=2), Run()
    saved = steps.state()

    def restore() -> int | None:
        run.step, run.samples = 4, 40
        steps.restore(saved)
        return 4

    def bad(step: int, samples: int) -> str:
        run.step, run.samples = step, samples
        assert not steps.applies(step, math.nan, 1.0)
        return steps.settle(run, restore)

    assert "back at step 4 and passes over the 60 samples since (1 of at most 2 rollbacks in a row)" in bad(10, 100)
    assert (run.step, run.samples) == (4, 100), "the data go on behind the bad step"
    assert "(2 of at most 2" in bad(6, 130)
    assert steps.applies(10, 1.0, 1.0)
    assert steps.applies(11, 1.0, 1.0), "the run got past the step that led to the first one"
    assert "(1 of at most 2" in bad(12, 200)
    assert "(2 of at most 2" in bad(12, 300)
    with pytest.raises(TrainingStopped, match=r"step 12: loss is NaN .* 2 rollbacks .* past step 12.*max_rollbacks"):
        bad(12, 400)
    assert steps.metrics()["passed_over_samples"] == 60 + 90 + 160 + 260


def _train(
    assets: str, run_folder: str, cache: str, settings: list[str], bad: dict[int, float], by: str, stop_at: int = 0
) -> dict[str, Any]:
    """Train with one rank's logits multiplied by `bad[n]`, `n` counting steps of the data, or steps.

    Args:
        by: "batch": the n-th batch of the data is bad, whenever it is read; "step": step n is; "left out": the n-th
            batch is not in the data.
        stop_at: ask for an end after this step, if not 0.
    """
    fixed = ["--model.hf-assets-path", assets, "--job.dump-folder", run_folder, "--training.tuned", "off"]
    fixed += ["--data.source", str(speeches(assets)), "--data.cache-folder", cache, "--training.seq-len", "32"]
    fixed += ["--training.steps", "12", "--training.local-batch-size", "2", "--checkpoint.no-last-save-in-hf"]
    config = load_config(None, [*fixed, *settings])
    stop = StopSignal()
    trainer = Trainer(config, validate(config, dist.get_world_size()), torch.device("cpu"), dist.get_rank() == 0, stop)
    read = trainer.batches.at
    size = trainer.batches.global_batch_size

    def read_without_them(first: int, *group: int) -> Any:
        for batch in sorted(bad):
            first += size * (first >= size * (batch - 1))
        return read(first, *group)

    if by == "left out":
        object.__setattr__(trainer.batches, "at", read_without_them)

    def spoil(module: Any, args: Any, output: Any) -> Any:
        number = trainer.samples // size + 1 if by == "batch" else trainer.step + 1
        if by != "left out" and number in bad and dist.get_rank() == 1:
            output.logits = output.logits * bad[number]
        stop.requested = stop.requested or trainer.step + 1 == stop_at
        return output

    trainer.model.register_forward_hook(spoil)
    message = ""
    try:
        trainer.train()
    except TrainingStopped as error:
        message = str(error)
    dist.barrier()
    lines = [json.loads(line) for line in Path(run_folder, "metrics.jsonl").read_text().splitlines()]
    bias = [layer.router.expert_bias.tolist() for layer in trainer.layers if layer.router is not None]  # type: ignore[union-attr]
    return {
        "message": message,
        "lines": lines,
        "losses": [line["loss"] for line in lines],
        "weights": (digests(trainer.model), bias),
        "checkpoints": sorted(path.name for path in Path(run_folder, "checkpoint").glob("step-*")),
    }


class Runs:
    """Runs of the trainer on two ranks, in folders of their own."""

    def __init__(self, ranks: RankPool, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        write_assets(folder / "assets")

    def __call__(
        self, name: str, settings: list[str], bad: dict[int, float], by: str = "batch", stop_at: int = 0
    ) -> dict[str, Any]:
        places = (self.folder / "assets", self.folder / name, self.folder / "cache")
        results = self.ranks.run(2, _train, *map(str, places), [*EP2, *settings], bad, by, stop_at)
        assert results[0] == results[1], "all ranks do the same"
        return results[0]


@pytest.fixture(scope="module")
def train(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("bad-steps"))


ROLLBACK = ["--fault-tolerance.on-bad-step", "rollback", "--checkpoint.interval", "3"]


def test_a_rollback_is_as_if_the_data_since_the_checkpoint_had_never_been(train: Runs) -> None:
    rolled_back = train("rolled-back", [*ROLLBACK, "--checkpoint.async-mode", "async"], {5: math.nan})
    without = train("without", ["--checkpoint.interval", "3"], {4: 0.0, 5: 0.0}, by="left out")
    assert rolled_back["message"] == ""
    assert [line["step"] for line in rolled_back["lines"]] == list(range(1, 13)), "no step is there twice"
    assert rolled_back["losses"] == without["losses"]
    assert rolled_back["weights"] == without["weights"]
    last = rolled_back["lines"][-1]
    assert (last["rollbacks"], last["skipped_steps"], last["passed_over_samples"]) == (1, 1, 8)


def test_a_run_that_is_stopped_after_a_rollback_goes_on_as_if_it_had_not_been(train: Runs) -> None:
    whole = train("whole", ROLLBACK, {5: math.nan})
    stopped = train("stopped", ROLLBACK, {5: math.nan}, stop_at=8)
    assert len(stopped["lines"]) == 8
    resumed = train("stopped", ROLLBACK, {5: math.nan})
    assert (resumed["losses"], resumed["weights"]) == (whole["losses"], whole["weights"])
    assert resumed["lines"][-1]["passed_over_samples"] == whole["lines"][-1]["passed_over_samples"] == 8


def test_a_step_that_is_bad_with_any_data_ends_the_run_after_some_rollbacks(train: Runs) -> None:
    ended = train("again", ROLLBACK, {5: math.nan}, by="step")
    assert "step 5: loss and gradient norm are NaN or infinite, after 3 rollbacks" in ended["message"]
    assert ended["checkpoints"] == ["step-00000003"]
    assert ended["lines"][-1]["rollbacks"] == 3


def test_without_a_checkpoint_to_go_back_to_a_bad_step_is_skipped(train: Runs) -> None:
    skipped = train("none-yet", ROLLBACK, {2: math.nan})
    assert [line["loss"] is None for line in skipped["lines"]] == [step == 2 for step in range(1, 13)]
    assert (skipped["lines"][-1]["skipped_steps"], skipped["lines"][-1]["rollbacks"]) == (1, 0)


def test_a_policy_of_stop_ends_the_run_with_the_reason_and_leaves_the_checkpoint_before(train: Runs) -> None:
    settings = ["--fault-tolerance.on-spike", "stop", "--fault-tolerance.spike-window", "4", "--checkpoint.interval=3"]
    ended = train("stop", settings, {7: 1e4})
    assert "step 7: loss " in ended["message"]
    assert "is more than 2 times the median" in ended["message"]
    assert ended["checkpoints"] == ["step-00000003", "step-00000006"]
    assert ended["lines"][-1]["spikes"] == 1


def test_a_checkpoint_that_fails_meanwhile_does_not_hide_why_the_run_was_stopped(train: Runs) -> None:
    settings = ["--fault-tolerance.on-spike", "stop", "--fault-tolerance.spike-window", "4", "--checkpoint.interval=6"]
    settings += ["--checkpoint.async-mode", "async"]
    train("stop-unwritten", settings, {}, stop_at=1)
    in_the_way = train.folder / "stop-unwritten" / "checkpoint" / ".step-00000006.partial"
    in_the_way.touch()
    ended = train("stop-unwritten", settings, {7: 1e4})
    assert "is more than 2 times the median" in ended["message"]
    assert str(in_the_way) in ended["message"]


def test_a_skipped_spike_leaves_no_trace_in_the_weights(train: Runs) -> None:
    settings = ["--fault-tolerance.on-spike", "skip", "--fault-tolerance.spike-window", "4"]
    spike, nan = (train(f"spike-{value}", settings, {7: value}) for value in (1e4, math.nan))
    assert spike["losses"][6] > 100
    assert nan["losses"][6] is None
    assert spike["losses"][7:] == nan["losses"][7:]
    assert spike["weights"] == nan["weights"]
