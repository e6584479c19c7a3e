"""What becomes of a step whose loss or gradient norm is not finite, or far above what is usual (docs/numbers.md)."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from crossdock.config import FaultToleranceConfig
from crossdock.train.together import TrainingStopped

__all__ = ["BadSteps", "Position"]

_LOSS, _NORM = "loss", "gradient norm"
_ADVICE = "Lower optimizer.lr, lengthen lr_scheduler.warmup_steps, or look at the data of these steps"


class Position(Protocol):
    """Where a run is.

    Attributes:
        step: the last one that is done.
        samples: of the data, read up to there.
    """

    step: int
    samples: int


class BadSteps:
    """The policy of `[fault_tolerance]` for bad steps and spikes.

    It hangs on the losses and norms that it is given alone: give it the same bits on all ranks, and all do the same.
    Ask `applies` once per step, before the optimizer's, and call `settle` when the step is recorded. A step that is not
    applied leaves weights, moments and expert biases as they were.

    Args:
        config: the policy.
        checkpoints: the folder of the run's checkpoints, for messages.
    """

    def __init__(self, config: FaultToleranceConfig, checkpoints: Path) -> None:
        self._config, self._checkpoints = config, checkpoints
        # Of the last steps that were applied.
        self._usual = {name: deque[float](maxlen=config.spike_window) for name in (_LOSS, _NORM)}
        self._factors = {_LOSS: config.loss_spike_factor, _NORM: config.norm_spike_factor}
        self._action: Literal["apply", "skip", "rollback", "stop"] = "apply"
        self._what = ""
        self._counts: dict[str, int] = dict.fromkeys(("skipped_steps", "spikes", "rollbacks", "passed_over_samples"), 0)
        self._in_a_row = 0
        # Rollbacks since a step was applied beyond the last one that led to one.
        self._rollbacks_in_a_row = self._rolled_back_from = 0

    @property
    def in_a_row(self) -> int:
        """How many steps, one after another up to the last one, were not applied."""
        return self._in_a_row

    def applies(self, step: int, loss: float, norm: float) -> bool:
        """Whether the optimizer takes this step.

        Args:
            step: its number.
            loss: of the global batch.
            norm: of the gradient, before clipping.
        """
        values = {_LOSS: loss, _NORM: norm}
        self._action, self._what = "apply", ""
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            self._action = self._config.on_bad_step
            self._what = f"{' and '.join(bad)} {'are' if len(bad) > 1 else 'is'} NaN or infinite"
        elif self._config.on_spike != "none" and (spikes := self._spikes(values)):
            self._action, self._what = self._config.on_spike, " and ".join(spikes)
            self._counts["spikes"] += 1
        if self._action == "apply":
            for name, value in values.items():
                self._usual[name].append(value)
            self._in_a_row = 0
            if step > self._rolled_back_from:
                self._rollbacks_in_a_row = 0
            return True
        self._in_a_row += 1
        self._counts["skipped_steps"] += 1
        return False

    def settle(self, run: Position, restore: Callable[[], int | None]) -> str:
        """Do what else the last step asks for; returns what to tell of it, empty where the step was applied.

        After a rollback the run goes on with the data behind the bad step: what it had read since the step that it went
        back to is passed over.

        Args:
            run: where it is; the data's position is set after `restore`.
            restore: puts the run, and these counters, back to the newest checkpoint, whose step it returns; `None`
                where there is none. Collective.

        Raises:
            TrainingStopped: where the policy asks for an end, or more steps or rollbacks in a row than are allowed.
        """
        if self._action == "apply":
            return ""
        if self._action == "stop":
            raise TrainingStopped(f"step {run.step}: {self._what}, which ends the run as set. {self._remedy()}")
        self._check_streaks(run.step)
        done = "the step is skipped"
        if self._action == "rollback":
            done = self._roll_back(run, restore) or f"{done}, since there is no checkpoint yet to go back to"
        return f"{self._what}; {done}"

    def metrics(self) -> dict[str, int]:
        """What has happened so far."""
        return dict(self._counts)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run decides alike: plain numbers."""
        return {
            **self._counts,
            "skipped_in_a_row": self._in_a_row,
            "rollbacks_in_a_row": self._rollbacks_in_a_row,
            "rolled_back_from": self._rolled_back_from,
            "usual_losses": list(self._usual[_LOSS]),
            "usual_norms": list(self._usual[_NORM]),
        }

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Go on with the `state` that is among the counters of a checkpoint."""
        self._counts = {name: counters.get(name, 0) for name in self._counts}
        self._in_a_row = counters.get("skipped_in_a_row", 0)
        self._rollbacks_in_a_row = counters.get("rollbacks_in_a_row", 0)
        self._rolled_back_from = counters.get("rolled_back_from", 0)
        for name, kept in ((_LOSS, "usual_losses"), (_NORM, "usual_norms")):
            self._usual[name].clear()
            self._usual[name].extend(counters.get(kept, ()))

    def _spikes(self, values: Mapping[str, float]) -> list[str]:
        """Those of `values` that are more than so many times the median of a full window."""
        found = []
        for name, value in values.items():
            usual, factor = self._usual[name], self._factors[name]
            if factor and len(usual) == usual.maxlen and value > factor * (median := statistics.median(usual)):
                of = f"the median {median:.4g} of the last {len(usual)} steps"
                found.append(f"{name} {value:.4g} is more than {factor:g} times {of}")
        return found

    def _check_streaks(self, step: int) -> None:
        most = self._config.max_skipped_steps
        if self._in_a_row >= most:
            raise TrainingStopped(
                f"{self._in_a_row} steps in a row were not applied; of the last, step {step}, {self._what}. "
                f"{self._remedy()} fault_tolerance.max_skipped_steps = {most} sets how many are allowed."
            )
        most = self._config.max_rollbacks
        if self._action == "rollback" and self._rollbacks_in_a_row >= most:
            raise TrainingStopped(
                f"step {step}: {self._what}, after {most} rollbacks that did not get the run past step "
                f"{self._rolled_back_from}. {self._remedy()} fault_tolerance.max_rollbacks sets how many are allowed."
            )

    def _roll_back(self, run: Position, restore: Callable[[], int | None]) -> str:
        """What was done; empty where there is nothing to go back to."""
        bad_step, samples, counts, in_a_row = run.step, run.samples, self._counts, self._rollbacks_in_a_row
        if (step := restore()) is None:
            return ""
        passed_over, run.samples = samples - run.samples, samples
        # Counts go on; what is usual is what it was at that step.
        self._counts = counts
        self._counts["rollbacks"] += 1
        self._counts["passed_over_samples"] += passed_over
        self._in_a_row, self._rollbacks_in_a_row = 0, in_a_row + 1
        self._rolled_back_from = max(bad_step, self._rolled_back_from)
        of = f"{self._rollbacks_in_a_row} of at most {self._config.max_rollbacks} rollbacks in a row"
        return f"the run is back at step {step} and passes over the {passed_over} samples since ({of})"

    def _remedy(self) -> str:
        return f"{_ADVICE}; or go back further: remove the newest folders of {self._checkpoints} and start again."
