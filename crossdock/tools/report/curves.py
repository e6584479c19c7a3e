"""Metrics over the steps, as charts: what each is called, its unit, and how it is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from crossdock.tools.report.charts import COLUMNS, Chart, Marks, Series, draw
from crossdock.tools.report.records import RunRecords

__all__ = ["MIB", "chart", "charts", "series_of"]

MIB = 2**20
_SENT = "MiB per step, all ranks"


class _Curve(NamedTuple):
    """How a metric is shown.

    Attributes:
        title, unit: for people.
        base: a value that the axis starts at; `None` fits it to the curve.
        logarithmic: draw on a logarithmic axis where the values ask for it.
        divisor: of the values, for the unit.
        height: of the plot, pixels.
    """

    title: str
    unit: str = ""
    base: float | None = 0.0
    logarithmic: bool = False
    divisor: float = 1.0
    height: int = 150


_CURVES: dict[str, _Curve] = {
    "loss": _Curve("Loss", "nats per token", None, True, height=240),
    "validation_loss": _Curve("Validation loss", "nats per token", None, True),
    "lr": _Curve("Learning rate"),
    "grad_norm": _Curve("Gradient norm", "before clipping", logarithmic=True),
    "tokens_per_second_per_gpu": _Curve("Throughput", "tokens/s per rank"),
    "memory_gib": _Curve("Memory", "GiB, the rank with most"),
    "tflops": _Curve("Model TFLOP/s", "per rank"),
    "mfu": _Curve("Model FLOPs utilisation", "% of the device's peak"),
    "step_seconds": _Curve("Step time", "seconds", logarithmic=True),
    "replica_wait_seconds": _Curve("Waiting for replicas' gradients", "seconds per step, a rank's mean", 0.0, True),
    "max_mean_load": _Curve("Busiest expert", "times the mean, the worst layer", 1.0, True),
    "load_entropy": _Curve("Entropy of loads", "1 is even, the worst layer", None),
    "load_variation": _Curve("Variation of loads", "standard deviation over mean, the worst layer"),
    "dead_experts": _Curve("Dead experts", "without a token in the step, all layers"),
    "dropped_routes": _Curve("Dropped routes", "beyond the capacity, per step, all layers"),
    "rank_max_mean": _Curve("Busiest rank", "times the mean of the ranks, the mean layer", 1.0, True),
    "node_max_mean": _Curve("Busiest node", "times the mean, the mean layer", 1.0),
    "imbalance_seconds": _Curve("Price of imbalance", "seconds per step", logarithmic=True),
    "borrowed_experts": _Curve("Borrowed experts", "per step, all layers and ranks"),
    "bytes_within_nodes": _Curve("Sent within nodes", _SENT, 0.0, True, MIB),
    "bytes_between_nodes": _Curve("Sent between nodes", _SENT, 0.0, True, MIB),
    "metadata_bytes": _Curve("Sent: counts, ids and weights", _SENT, 0.0, True, MIB),
    "replica_bytes": _Curve("Sent: experts' gradients, over replicas", _SENT, 0.0, True, MIB),
    "replica_groups": _Curve("Replica groups", "that took part"),
    "stall_seconds": _Curve("Stalls between steps", "seconds until the step began for good", logarithmic=True),
    "slowest_rank_ratio": _Curve("Slowest rank", "times the median of the others", 1.0),
    "skipped_steps": _Curve("Skipped steps", "so far"),
}


def _curve(key: str) -> _Curve:
    if key in _CURVES:
        return _CURVES[key]
    # A model's own loss, by the name that it gave it.
    return _Curve(key.replace("_", " ").replace("aux", "auxiliary").capitalize(), "before its coefficient", None, True)


def series_of(
    records: RunRecords, key: str, name: str = "", columns: int = COLUMNS, colour: int | None = None
) -> Series:
    """A metric that the run has; for the rest see `Series`. Its name is the curve's own where none is given."""
    curve = _curve(key)
    return Series.of(name or curve.title, records.steps, records.column(key) / curve.divisor, columns, colour)


def chart(
    key: str, series: Sequence[Series], span: tuple[int, int], marks: Marks | None = None, height: int | None = None
) -> str:
    """The chart of a metric; see `Chart`. Its height is the curve's own where none is given."""
    curve = _curve(key)
    height = curve.height if height is None else height
    return draw(Chart(key, curve.title, curve.unit, series, span, curve.base, curve.logarithmic, marks, height))


def charts(records: RunRecords, keys: Iterable[str]) -> list[str]:
    """One of each metric that the run has."""
    return [chart(key, [series_of(records, key)], records.span) for key in keys if records.has(key)]
