"""Replica groups: whole copies of a model that train together, and go on when one of them is gone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

__all__ = ["LOOPBACK", "GroupPlace", "GroupsFailed", "OneGroup", "ReplicaGroups"]


LOOPBACK = "127.0.0.1"
"""The address of this machine within itself."""


class GroupsFailed(RuntimeError):
    """Why a group cannot go on beside the others: one sentence for people. Another start may help."""


@dataclass(frozen=True)
class GroupPlace:
    """Where a group is among those of a run, as its launcher says.

    Attributes:
        number: of the group, from 0, as long as the run lasts.
        groups: that the run has when all are there.
        lighthouse: `http://HOST:PORT`, where groups find one another.
        host: name or address of this machine, as the other groups reach it.
        folder: where a group leaves word for its launcher.
    """

    number: int
    groups: int
    lighthouse: str
    host: str
    folder: Path

    @property
    def is_alone(self) -> bool:
        """Whether all groups are on this machine, so that nobody else need reach it."""
        return self.host == LOOPBACK


class ReplicaGroups(Protocol):
    """Groups of ranks, each a world with a whole copy of the model, of which rank `r` has the same part in all groups.

    They take steps together, each with its share of the samples:

        while not groups.begin_step():  # who takes part; a group that was away catches up here
            ...                 # not enough of them yet
        groups.sum_(values)     # as often as need be, in the same order in all groups
        if groups.commit():     # else none of it counts: begin again with those who are left
            ...

    All methods are collective among the ranks of this group, and `sum_` among the groups that take part. No failure of
    another group raises: from there on sums are worth nothing, `is_broken` says so, and `commit` returns false.

    Attributes:
        number: of this group, as long as the run lasts.
        index: of this group among the `count` that take part in the step.
        count: how many take part.
        is_broken: whether a sum of this step has failed on this rank.
    """

    @property
    def number(self) -> int: ...

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def is_broken(self) -> bool: ...

    def begin_step(self) -> bool:
        """Find out who takes part in the next step; false where too few were there for a while: ask again.

        Raises:
            GroupsFailed: on all ranks of this group.
        """
        ...

    def sum_(self, *tensors: Tensor) -> None:
        """Sum each tensor over the groups that take part, in place; the same bits in all of them."""
        ...

    def commit(self) -> bool:
        """Whether all sums of the step were right on all ranks of this group, so that its results count."""
        ...

    def settle(self) -> bool:
        """Wait for the other groups between two steps; whether none was lost, for all ranks of this group."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


class OneGroup:
    """The only copy there is: nothing to sum, nothing to wait for."""

    number = index = 0
    count = 1
    is_broken = False

    def begin_step(self) -> bool:
        return True

    def sum_(self, *tensors: Tensor) -> None:
        pass

    def commit(self) -> bool:
        return True

    def settle(self) -> bool:
        return True

    def close(self) -> None:
        pass
