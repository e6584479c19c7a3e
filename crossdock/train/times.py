"""Where the time of a step goes, as metrics (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["step_times"]

# Metrics by phases of the trainer, and by parts of MoE layers in whatever phase; all else is `other`.
_PARTS = ("router", "dispatch", "experts", "combine")
_PHASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "data": ("data",),
        "agreement": ("agreement", "other groups", "metrics"),
        "forward": ("forward", "pipeline"),
        "backward": ("backward",),
        "optimizer": ("gradient norm", "optimizer"),
        "balance": ("migration",),
    }
)


def step_times(seconds: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """The metrics `*_seconds`, which add up to `step_seconds`.

    Args:
        seconds: by phase and part, what `Place.take_seconds` gives once per step.
    """
    names = {phase: name for name, phases in _PHASES.items() for phase in phases}
    sums = dict.fromkeys((*_PHASES, *_PARTS, "other"), 0.0)
    for (phase, part), spent in seconds.items():
        sums[part if part in _PARTS else names.get(phase, "other")] += spent
    # A microsecond is as fine as these are.
    rounded = {f"{name}_seconds": round(spent, 6) for name, spent in sums.items()}
    return {"step_seconds": round(sum(sums.values()), 6), **rounded}
