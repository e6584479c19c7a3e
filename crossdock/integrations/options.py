"""Options of the plug-ins, kept apart from the libraries that they plug into."""

from __future__ import annotations

from dataclasses import dataclass, replace

from crossdock.dispatch import DISPATCHERS
from crossdock.experts import AUTO, EXPERTS_BACKENDS

__all__ = ["PluginOptions", "configure", "current_options"]


@dataclass(frozen=True)
class PluginOptions:
    """What `configure` sets."""

    dispatcher: str = "alltoall"
    """How tokens travel, of `crossdock.dispatch.DISPATCHERS`. A model takes it when it is loaded."""
    experts: str = AUTO
    """Backend of `experts_implementation="crossdock"`, of `crossdock.experts.EXPERTS_BACKENDS`, or `auto`: `cpu` on
    a CPU, `grouped_mm` on a GPU, `eager` where that cannot. Looked up in every forward pass."""


_options = PluginOptions()


def configure(*, dispatcher: str | None = None, experts: str | None = None) -> PluginOptions:
    """Set options of the plug-ins in this process; call it before a model is loaded, on all ranks alike.

    Args:
        dispatcher: see `PluginOptions`; `None` leaves an option as it is.
        experts: likewise.

    Returns:
        All options as they are now.

    Raises:
        ValueError: for a value that is not valid; nothing is set then.
    """
    global _options
    _check("dispatcher", dispatcher, sorted(DISPATCHERS))
    _check("experts", experts, [AUTO, *sorted(EXPERTS_BACKENDS)])
    given = {"dispatcher": dispatcher, "experts": experts}
    _options = replace(_options, **{name: value for name, value in given.items() if value is not None})
    return _options


def current_options() -> PluginOptions:
    """The options as `configure` left them."""
    return _options


def _check(name: str, value: str | None, valid: list[str]) -> None:
    if value is not None and value not in valid:
        raise ValueError(f"crossdock.configure: {name} = {value!r} is unknown; valid: {', '.join(valid)}")
