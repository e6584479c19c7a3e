"""What recorded loads say: over time in columns, at the end as figures, and where a router collapses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossdock.tools.report.numbers import short, steps_text

__all__ = ["COLUMNS", "OVERLOAD", "Balance", "FinalLoad", "warnings"]

# Across a heat map.
COLUMNS = 150
# An expert with more than this many times the mean load over the last quarter of the records is warned of.
OVERLOAD = 3.0
# An expert without a route is warned of where an even router would have sent it this many over that time.
IDLE_ROUTES = 50
# Layers that the warnings name, and experts of each.
_MOST_LAYERS = 8
_MOST_EXPERTS = 6


@dataclass(frozen=True)
class FinalLoad:
    """The load over the last quarter of the records.

    Attributes:
        first, last: steps of the first and the last record of that time.
        routes: `[L, E]` int64; `E` are experts, or ranks, or whatever else has a load.
        ratios: `[L, E]`, load over the layer's mean; NaN for a layer without a route.
    """

    first: int
    last: int
    routes: np.ndarray
    ratios: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """`[L, E]`: the ratios, 0 for a layer without a route."""
        return np.nan_to_num(self.ratios)

    def effective_number(self) -> np.ndarray:
        """`[L]`: the exponential of the entropy of a layer's shares; `E` under perfect balance, 1 at a collapse."""
        shares = self.routes / np.maximum(self.routes.sum(axis=-1, keepdims=True), 1)
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        return np.exp(-(shares * logs).sum(axis=-1))


@dataclass(frozen=True)
class Balance:
    """Loads over the mean of their layer, in columns of as many records each.

    Attributes:
        first, last: `[C]`, steps of a column's first and last record.
        ratios: `[C, L, E]`; NaN for a layer without a route.
        final: the last quarter.
        records: how many there are.
    """

    first: np.ndarray
    last: np.ndarray
    ratios: np.ndarray
    final: FinalLoad
    records: int

    @classmethod
    def of(cls, steps: np.ndarray, counts: np.ndarray, together: int = 1) -> Balance:
        """From records `steps` `[N]` and `counts` `[N, L, E]`, one or more.

        Args:
            together: neighbours whose loads are summed, such as the ranks of a node; a divisor of `E`.
        """
        records = len(steps)
        every = -(-records // COLUMNS)
        starts = np.arange(0, records, every)
        ends = np.minimum(starts + every, records)
        # One column at a time: the counts may be a mapped file of gigabytes.
        sums = np.stack([_sum(counts[a:b], together) for a, b in zip(starts, ends, strict=True)])
        quarter = records - -(-records // 4)
        routes = _sum(counts[quarter:], together)
        final = FinalLoad(int(steps[quarter]), int(steps[-1]), routes, _over_mean(routes))
        return cls(steps[starts], steps[ends - 1], _over_mean(sums), final, records)


def _sum(counts: np.ndarray, together: int) -> np.ndarray:
    """`[L, E / together]` of `counts` `[N, L, E]`."""
    routes = counts.sum(axis=0, dtype=np.int64)
    return routes.reshape(len(routes), -1, together).sum(axis=-1)


def _over_mean(routes: np.ndarray) -> np.ndarray:
    mean = routes.mean(axis=-1, keepdims=True)
    return np.divide(routes, mean, out=np.full(routes.shape, np.nan), where=mean > 0)


def warnings(final: FinalLoad) -> list[str]:
    """A sentence for each layer whose router seems to collapse: experts without a route, or with far too many."""
    when = steps_text(final.first, final.last)
    sentences = []
    for layer, (routes, ratios) in enumerate(zip(final.routes, final.ratios, strict=True)):
        problems = []
        idle = np.flatnonzero(routes == 0)
        if len(idle) and routes.mean() >= IDLE_ROUTES:
            problems.append(f"{_experts(idle)} received no token")
        heavy = np.flatnonzero(ratios > OVERLOAD)
        if len(heavy):
            busiest = heavy[np.argsort(-ratios[heavy], kind="stable")]
            times = ", ".join(short(round(float(ratios[expert]), 1)) for expert in busiest[:_MOST_EXPERTS])
            problems.append(f"{_experts(busiest)} received {times} times the mean")
        if problems:
            sentences.append(f"Layer {layer}: {' and '.join(problems)} ({when}).")
    if len(sentences) > _MOST_LAYERS:
        more = len(sentences) - _MOST_LAYERS
        sentences[_MOST_LAYERS:] = [
            f"The same of {more} more layer{'s' * (more > 1)}; the table of loads has them all."
        ]
    return sentences


def _experts(experts: np.ndarray) -> str:
    names = [str(expert) for expert in experts[:_MOST_EXPERTS]]
    if len(experts) > _MOST_EXPERTS:
        return f"experts {', '.join(names)} and {len(experts) - _MOST_EXPERTS} more"
    return f"expert {names[0]}" if len(names) == 1 else f"experts {', '.join(names[:-1])} and {names[-1]}"
