"""Chrome traces of single steps, with a named range for each phase, each block and each part of an MoE layer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import _disable_current_modes

from crossdock.comm import Place
from crossdock.config import ProfilingConfig

__all__ = ["TRACES_FOLDER", "StepProfiler"]

logger = logging.getLogger(__name__)

TRACES_FOLDER = "profile_traces"
"""Of a run folder: `step-00000003/rank-0.json.gz` and so on."""
# After a start the first two steps are like no other: memory is asked for, kernels are chosen.
_FIRST = 3


class StepProfiler:
    """Traces of some steps of this rank. Off, it costs two calls per step, and marks of layers look at one attribute.

    Ranges are of `record_function`, which is an operator: it is called where no dispatch mode sees it, so that
    selective recompute has nothing to do with it.

    Args:
        config: which steps.
        folder: of the run.
        place: tells where the main thread is.
        rank: of this process, over all machines.
        device: of this rank.
    """

    def __init__(self, config: ProfilingConfig, folder: Path, place: Place, rank: int, device: torch.device) -> None:
        self._config, self._folder, self._place, self._rank = config, folder, place, rank
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._begun = 0
        self._has_traced = False
        self._profile: profile | None = None
        self._step = 0
        self._phase = _Range()
        self._part = _Range()

    def begin(self, step: int) -> None:
        """Before each step: the profiler is warmed up in the step before the one that it records."""
        if not self._config.enable_profiling:
            return
        self._begun += 1
        if self._profile is not None:
            self._profile.step()
            self._place.on_move = self._move
        elif self._is_due(step + 1):
            self._step = step + 1
            self._profile = profile(
                activities=self._activities,
                schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
                on_trace_ready=self._write,
            )
            self._profile.start()

    def end(self) -> None:
        """After each step."""
        if self._place.on_move is None or self._profile is None:
            return
        self._leave()
        self._profile.step()
        self.close()

    def close(self) -> None:
        """Where the run ends; a step that is not over leaves no trace."""
        if self._profile is not None:
            self._leave()
            self._profile.stop()
            self._profile = None
        if self._begun and not self._has_traced:
            logger.warning(f"no trace: this start ended before its step {_FIRST}, the first that is recorded")

    def _is_due(self, step: int) -> bool:
        return step % self._config.profile_freq == 0 or self._begun + 1 == _FIRST

    def _move(self, place: Place) -> None:
        """Close what is over and open what begins. A backward pass may say so from a thread of its own."""
        self._part.close()
        if place.phase != self._phase.name:
            self._phase.close()
            self._phase = _Range(place.phase)
        if place.layer:
            self._part = _Range(f"{place.part} {place.layer}".lstrip())

    def _leave(self) -> None:
        self._place.on_move = None
        self._part.close()
        self._phase.close()
        self._phase = _Range()

    def _write(self, recorded: Any) -> None:
        self._has_traced = True
        path = self._folder / TRACES_FOLDER / f"step-{self._step:08d}" / f"rank-{self._rank}.json.gz"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.warning(f"step {self._step}: no trace: {error}")
        else:
            logger.info(f"step {self._step}: trace of each rank: {path.parent}")


class _Range:
    """A named range that is open; without a name there is none."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self._open: Any = None
        if name:
            with _disable_current_modes():
                self._open = record_function(name)
                self._open.__enter__()

    def close(self) -> None:
        if self._open is not None:
            with _disable_current_modes():
                self._open.__exit__(None, None, None)
            self._open = None
