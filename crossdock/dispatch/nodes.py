"""Which expert-parallel ranks share a node."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Nodes", "find_nodes"]


@dataclass(frozen=True)
class Nodes:
    """The nodes of a group of ranks.

    Attributes:
        of_ranks: the node of each rank, numbered from 0 in the order of the ranks.
    """

    of_ranks: tuple[int, ...]

    @classmethod
    def consecutive(cls, num_ranks: int, ranks_per_node: int) -> Nodes:
        """Nodes of so many consecutive ranks each; the last one may have fewer."""
        return cls(tuple(rank // ranks_per_node for rank in range(num_ranks)))

    @property
    def count(self) -> int:
        return max(self.of_ranks) + 1

    @property
    def size(self) -> int | None:
        """How many ranks each node has, where all have as many and consecutive ones; else `None`."""
        size = self.of_ranks.count(0)
        even = Nodes.consecutive(len(self.of_ranks), size) == self and len(self.of_ranks) % size == 0
        return size if even else None

    def __str__(self) -> str:
        return " ".join(map(str, self.of_ranks))


def find_nodes(ranks: Sequence[int], ranks_per_node: int, ranks_per_machine: int = 0) -> Nodes:
    """The nodes of a group: what is set, or what the launch says. Without communication, the same on all ranks.

    torchrun numbers the ranks of a machine consecutively and starts as many on each, which it tells them all in
    `LOCAL_WORLD_SIZE`; a launch that tells ranks different numbers is broken, and so would their nodes be. Where there
    is no such variable, a node has a rank per GPU of this machine, or all ranks where there is none.

    Args:
        ranks: the group's, in the world.
        ranks_per_node: consecutive ranks of the group that make a node; 0: as they were launched.
        ranks_per_machine: how many are launched on each; 0: what the launch has told this process.
    """
    if ranks_per_node:
        return Nodes.consecutive(len(ranks), ranks_per_node)
    # The launcher's word, like the rank itself: torch passes on the latter alone.
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    launched = ranks_per_machine or (int(told) if told.isdecimal() else 0)
    if not launched:
        return Nodes.consecutive(len(ranks), torch.cuda.device_count() or len(ranks))
    machines = [rank // launched for rank in ranks]
    numbers = {machine: number for number, machine in enumerate(dict.fromkeys(machines))}
    return Nodes(tuple(numbers[machine] for machine in machines))
