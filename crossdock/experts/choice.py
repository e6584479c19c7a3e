"""Which backend computes: the one that was asked for, or the best that can."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MappingProxyType

from torch import Tensor

from crossdock.experts.cpu import cpu, cpu_problem
from crossdock.experts.eager import eager
from crossdock.experts.experts import ExpertParams, ExpertsBackend
from crossdock.experts.grouped_mm import grouped_mm, grouped_mm_problem

__all__ = ["AUTO", "EXPERTS_BACKENDS", "choose_backend"]

logger = logging.getLogger(__name__)

AUTO = "auto"
EXPERTS_BACKENDS: Mapping[str, ExpertsBackend]
EXPERTS_BACKENDS = MappingProxyType({"cpu": cpu, "eager": eager, "grouped_mm": grouped_mm})
# Why a backend cannot compute these tokens with these parameters; the best first. `eager` always can.
_PROBLEMS: Mapping[str, Callable[[Tensor, ExpertParams], str | None]]
_PROBLEMS = MappingProxyType({"cpu": cpu_problem, "grouped_mm": grouped_mm_problem})


def choose_backend(name: str, tokens: Tensor, params: ExpertParams, *, static: bool = False) -> ExpertsBackend:
    """The backend `name` for `tokens [U, H]`, or `eager`, said once, where it cannot compute them.

    Args:
        name: of `EXPERTS_BACKENDS`, or `auto`: `cpu` on a CPU, `grouped_mm` elsewhere, `eager` where that cannot.
        static: `grouped_mm` with a row for every route that there could be, whatever the name.

    Raises:
        ValueError: where `static` cannot be.
    """
    if static:
        if problem := grouped_mm_problem(tokens, params):
            raise ValueError(
                f"static_shapes computes experts by 'grouped_mm', which {problem}; use static_shapes = false"
            )
        return partial(grouped_mm, static=True)
    if name == AUTO:
        name = next((each for each, problem in _PROBLEMS.items() if problem(tokens, params) is None), "eager")
    elif name in _PROBLEMS and (problem := _PROBLEMS[name](tokens, params)):
        _say_once(f"experts backend {name!r} {problem}; computing with 'eager'")
        name = "eager"
    return EXPERTS_BACKENDS[name]


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
