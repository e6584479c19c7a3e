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
from crossdock.experts.triton import triton, triton_problem
from crossdock.kernels import TileTable

__all__ = ["AUTO", "EXPERTS_BACKENDS", "backend_problem", "choose_backend", "pick_backend"]

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The value of `experts` that leaves the choice to `pick_backend`."""
EXPERTS_BACKENDS: Mapping[str, ExpertsBackend]
EXPERTS_BACKENDS = MappingProxyType({"cpu": cpu, "eager": eager, "grouped_mm": grouped_mm, "triton": triton})
"""Each backend by the name that a user gives."""
# Why a backend cannot compute these tokens with these parameters. `eager` always can.
_PROBLEMS: Mapping[str, Callable[[Tensor, ExpertParams], str | None]]
_PROBLEMS = MappingProxyType({"cpu": cpu_problem, "grouped_mm": grouped_mm_problem, "triton": triton_problem})
# What `auto` takes the first of that can; `triton` has not been measured on hardware.
_AUTOMATIC = ("cpu", "grouped_mm")


def choose_backend(
    name: str,
    tokens: Tensor,
    params: ExpertParams,
    *,
    static: bool = False,
    is_whole: bool = False,
    tiles: TileTable | None = None,
) -> ExpertsBackend:
    """The backend `name` for `tokens [U, H]`, or `eager`, said once, where it cannot compute them.

    Args:
        name: of `EXPERTS_BACKENDS`, or `auto`: `cpu` on a CPU, `grouped_mm` elsewhere, `eager` where that cannot.
        static: with a row for every route that there could be; by `triton` where that is the name, else `grouped_mm`.
        is_whole: whether `params` are all experts, so that there are as many routes as there could be but for dropped
            ones.
        tiles: of `triton`'s kernels; its own choice unless told.

    Raises:
        ValueError: where `static` cannot be.
    """
    if static:
        name = "triton" if name == "triton" else "grouped_mm"
        if problem := backend_problem(name, tokens, params):
            raise ValueError(f"static_shapes computes experts by {name!r}, which {problem}; use static_shapes = false")
    elif name == AUTO:
        name = pick_backend(tokens, params)
    elif problem := backend_problem(name, tokens, params):
        _say_once(f"experts backend {name!r} {problem}; computing with 'eager'")
        name = "eager"
    if name == "triton":
        # Without a sync where that takes no more memory.
        return partial(triton, static=static or is_whole, tiles=tiles)
    return partial(grouped_mm, static=True) if static else EXPERTS_BACKENDS[name]


def pick_backend(tokens: Tensor, params: ExpertParams) -> str:
    """What `auto` comes to for `tokens [U, H]`."""
    return next((name for name in _AUTOMATIC if backend_problem(name, tokens, params) is None), "eager")


def backend_problem(name: str, tokens: Tensor, params: ExpertParams) -> str | None:
    """Why the backend `name` cannot compute `tokens [U, H]`, or `None` where it can."""
    return _PROBLEMS[name](tokens, params) if name in _PROBLEMS else None


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
