"""Measuring the settings that are left open, on this machine and at a model's shape (docs/tune.md)."""

from crossdock.tools.tune.sweep import SweepFailed
from crossdock.tools.tune.tuning import TuneOptions, tune

__all__ = ["SweepFailed", "TuneOptions", "tune"]
