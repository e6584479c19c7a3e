"""Options of the plug-ins, kept apart from the libraries that they plug into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from crossdock.comm import Wire, WireDtype
from crossdock.dispatch import DISPATCHERS, DispatchOptions
from crossdock.experts import AUTO, EXPERTS_BACKENDS

__all__ = ["PluginOptions", "configure", "current_options"]


@dataclass(frozen=True)
class PluginOptions:
    """What `configure` sets. A model takes those of the dispatcher when it is loaded."""

    dispatcher: str = "alltoall"
    """How tokens travel, of `crossdock.dispatch.DISPATCHERS`."""
    ranks_per_node: int = 0
    """Expert-parallel ranks that make a node, for `hierarchical`; 0: the GPUs of a machine, or all ranks."""
    wire_dtype: WireDtype = "same"
    """What tokens travel in: `same`, `bf16`, `fp16`, or `fp8` with a scale for every 128 values."""
    wire_directions: Literal["tokens", "both"] = "tokens"
    """What `wire_dtype` applies to: the forward pass's tokens alone, or results and gradients as well (`both`)."""
    experts: str = AUTO
    """Backend of `experts_implementation="crossdock"`, of `crossdock.experts.EXPERTS_BACKENDS`, or `auto`: `cpu` on
    a CPU, `grouped_mm` on a GPU, `eager` where that cannot. Looked up in every forward pass."""

    def dispatch_options(self) -> DispatchOptions:
        """Those of the dispatcher."""
        return DispatchOptions(self.ranks_per_node, Wire(self.wire_dtype, both=self.wire_directions == "both"))


_VALID: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "dispatcher": sorted(DISPATCHERS),
        "wire_dtype": get_args(WireDtype),
        "wire_directions": ("tokens", "both"),
        "experts": [AUTO, *sorted(EXPERTS_BACKENDS)],
    }
)
_options = PluginOptions()


def configure(
    *,
    dispatcher: str | None = None,
    ranks_per_node: int | None = None,
    wire_dtype: WireDtype | None = None,
    wire_directions: Literal["tokens", "both"] | None = None,
    experts: str | None = None,
) -> PluginOptions:
    """Set options of the plug-ins in this process; call it before a model is loaded, on all ranks alike.

    Args:
        dispatcher: see `PluginOptions`; `None` leaves an option as it is.
        ranks_per_node: likewise.
        wire_dtype: likewise.
        wire_directions: likewise.
        experts: likewise.

    Returns:
        All options as they are now.

    Raises:
        ValueError: for a value that is not valid; nothing is set then.
    """
    global _options
    given: dict[str, Any] = {
        "dispatcher": dispatcher,
        "ranks_per_node": ranks_per_node,
        "wire_dtype": wire_dtype,
        "wire_directions": wire_directions,
        "experts": experts,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name in _VALID and value not in _VALID[name]:
            raise ValueError(f"crossdock.configure: {name} = {value!r} is unknown; valid: {', '.join(_VALID[name])}")
    if ranks_per_node is not None and ranks_per_node < 0:
        raise ValueError(f"crossdock.configure: ranks_per_node = {ranks_per_node} must be 0 or more")
    _options = replace(_options, **given)
    return _options


def current_options() -> PluginOptions:
    """The options as `configure` left them."""
    return _options
