"""Calibration by a run that was measured: what it held and how fast it was."""

from __future__ import annotations

from dataclasses import replace

from crossdock.config import Config
from crossdock.parallel import ParallelDims
from crossdock.tools.plan.estimate import Estimator
from crossdock.tools.plan.figures import Calibration

__all__ = ["calibrated_on_run"]


def calibrated_on_run(
    estimator: Estimator, config: Config, dims: ParallelDims, *, tokens_per_second: float, memory_bytes: float
) -> Calibration:
    """Two numbers that make the estimate of a layout what was measured there.

    Activation bytes per token are what the formulas for all else leave of `memory_bytes`; the share of the peak is the
    one that gives `tokens_per_second`, everything that is not hidden beside it taken into account.

    Args:
        estimator: of the model and device.
        config: of the run that was measured.
        dims: its layout.
        tokens_per_second: of one rank.
        memory_bytes: of the rank that held most.

    Raises:
        ValueError: where less was held than states alone take, or tokens went faster than the peak allows.
    """
    probe = Estimator(estimator.facts, estimator.device, estimator.skew, Calibration(activation_bytes=0.0))
    estimate = probe.estimate(config, dims)
    left = memory_bytes - estimate.memory.total
    if left < 0:
        held = estimate.memory.total / 2**30
        raise ValueError(f"{memory_bytes / 2**30:.1f} GiB are less than parameters and their states take, {held:.1f}")
    slow, fast = 1e-6, 1.0
    if _rate(probe, config, dims, fast) < tokens_per_second:
        raise ValueError(f"{tokens_per_second:,.0f} tokens per second are more than the device's peak allows")
    for _ in range(60):
        middle = (slow + fast) / 2
        slow, fast = (middle, fast) if _rate(probe, config, dims, middle) < tokens_per_second else (slow, middle)
    return Calibration(
        achieved=fast, activation_bytes=left / estimate.routes.tokens, source=f"a run that was measured on {dims}"
    )


def _rate(estimator: Estimator, config: Config, dims: ParallelDims, achieved: float) -> float:
    calibration = replace(estimator.calibration, achieved=achieved)
    tried = Estimator(estimator.facts, estimator.device, estimator.skew, calibration)
    return tried.estimate(config, dims).tokens_per_second
