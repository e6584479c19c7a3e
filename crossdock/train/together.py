"""What ranks do together before and after the training loop, so that none waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from crossdock.comm import raise_together

__all__ = ["TrainingStopped", "any_rank", "first_named", "from_first_rank", "patient_group", "together"]


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


def together(action: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Run `action`; if it fails on any rank, raise on all. Collective.

    Args:
        action: what this rank does.
        group: of all ranks, where another time-out than the default group's is wanted.
    """
    error: Exception | None = None
    result = None
    try:
        result = action()
    except OSError as caught:
        place = caught.filename2 or caught.filename  # Of a renaming, the new name.
        named = f"{place}: " if place else ""
        error = TrainingStopped(f"{named}{caught.strerror or caught}")
    except Exception as caught:  # noqa: BLE001 (whatever it is, the others must hear of it)
        error = caught
    raise_together(error, group)
    return result


def patient_group() -> dist.ProcessGroup:
    """A group of all ranks that waits for a day, for what may take long on one of them. Collective."""
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    assert isinstance(group, dist.ProcessGroup)
    return group


def any_rank(value: bool) -> bool:
    """Whether `value` is true on any rank. Collective."""
    found = torch.tensor(float(value))
    dist.all_reduce(found)
    return bool(found)


def from_first_rank(action: Callable[[], Any]) -> Any:
    """What `action` returns on the first rank, which alone runs it. Collective."""
    values = [together(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def first_named(folder: str) -> str:
    """The folder that the first rank with one names. Collective."""
    folders: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(folders, folder)
    return next(name for name in folders if name)
