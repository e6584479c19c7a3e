"""A run of several replica groups: what a group that comes back takes over, and what all agree on at each step."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from crossdock.checkpoint import CHECKPOINT_FOLDER, Checkpointer
from crossdock.config import Config
from crossdock.parallel import GroupPlace, OneGroup, ReplicaGroups
from crossdock.routed_experts import RoutedExperts
from crossdock.train.together import TrainingStopped

if TYPE_CHECKING:
    from crossdock.integrations.catch_up import RankState
    from crossdock.integrations.torchft import HasState

__all__ = ["LiveState", "check_alike", "fingerprint", "join_groups", "sum_everywhere"]

_Counters = dict[str, Any]
_SEEDS_APART = 2**32
_FINGERPRINTS = 2**20  # So that sums of their squares are whole numbers in float64.


def join_groups(place: GroupPlace | None, config: Config, state: Callable[[], HasState]) -> ReplicaGroups:
    """The groups that a run consists of; imports torchft where there are several."""
    if place is None:
        return OneGroup()
    from crossdock.integrations.torchft import TorchFTGroups

    # Less than the watchdog waits, which would end this rank, for ranks of this group that wait for it meanwhile.
    timeout = max(1, config.job.comm_timeout_seconds // 2)
    return TorchFTGroups(place, config.fault_tolerance.min_replica_groups, timeout, state)


class LiveState:
    """What this rank gives to a group that comes back, and takes when its own does (`integrations.torchft.HasState`).

    Weights and the optimizer's moments as this rank holds them, buffers such as the expert bias, and counters, with the
    places of experts in them. Random states are each group's own: they start anew, from numbers not used before.

    Args:
        folder: of the run.
        model: on its layout.
        optimizer: with its states.
        counters: gives all that is no tensor, with `step`.
        take_counters: takes it, before tensors have their values: experts are put in their places. Collective.
        seed: of this rank.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        counters: Callable[[], _Counters],
        take_counters: Callable[[_Counters], None],
        seed: int,
    ) -> None:
        self._all = Checkpointer(folder / CHECKPOINT_FOLDER, model, optimizer)
        self._counters, self._take_counters, self._seed = counters, take_counters, seed

    def own(self) -> RankState:
        from crossdock.integrations.catch_up import RankState

        return RankState({held.place.name: held.local for held in self._all.held()}, self._counters())

    def take(self, state: RankState) -> None:
        from crossdock.integrations.catch_up import take_over

        self._take_counters(state.values)
        take_over({held.place.name: held.local for held in self._all.held()}, state)
        self._all.weights_changed()
        torch.manual_seed((self._seed + _SEEDS_APART * (1 + state.values["step"])) % 2**63)


class _Marks:
    """A number below 2^20 of each group, of which `sums`, once summed over the groups, tell whether they `differ`."""

    def __init__(self, own: int, groups: ReplicaGroups, device: torch.device | None = None) -> None:
        self._groups = groups
        self.sums = torch.tensor([own, own * own], dtype=torch.float64, device=device)

    @property
    def differ(self) -> bool:
        # All are equal if and only if the square of their sum is as many times the sum of their squares.
        total, squares = self.sums.tolist()
        return not self._groups.is_broken and total * total != self._groups.count * squares


def check_alike(groups: ReplicaGroups, state: Callable[[], HasState]) -> None:
    """Go no further where groups that took the same steps have other weights and moments, by a bit. Collective.

    Raises:
        TrainingStopped: on all ranks: silent drift, or a machine that computes wrongly.
    """
    if groups.count == 1:
        return
    digest = xxhash.xxh3_64()
    for tensor in state().own().tensors.values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    marks = _Marks(digest.intdigest() % _FINGERPRINTS, groups)
    groups.sum_(marks.sums)
    differing = torch.tensor(float(marks.differ))
    dist.all_reduce(differing)
    if differing:
        raise TrainingStopped(
            f"the weights of the {groups.count} replica groups are not the same any more, though they have taken the "
            "same steps: a machine computes wrongly, or its memory is damaged. The newest checkpoint is from before"
        )


def fingerprint(run: str, step: int, samples: int, layers: Sequence[RoutedExperts]) -> int:
    """A number below 2^20 that is the same on ranks that can take a step together, and hardly on others.

    Args:
        run: hash of code and settings.
        step, samples: done so far.
        layers: with the places of experts.
    """
    places = tuple(layer.placement.row_to_expert for layer in layers)
    return zlib.crc32(repr((run, step, samples, places)).encode()) % _FINGERPRINTS


def sum_everywhere(
    values: Tensor, groups: ReplicaGroups, mark: Callable[[], int], words: Sequence[float]
) -> tuple[list[float] | None, list[float]]:
    """`values` `[N]` float64, summed over all ranks of all groups, and `words`, over those of this group. Collective.

    Returns:
        Both sums; `None` in place of the first where groups have failed.

    Raises:
        TrainingStopped: on all ranks, where groups are not in the same state: their gradients must not be summed.
    """
    marks = _Marks(mark() if groups.count > 1 else 0, groups, values.device)
    groups.sum_(values, marks.sums)
    # After the groups' sum, so that all ranks of this one hear of a failure that one of them has seen.
    told = torch.cat([values, values.new_tensor([groups.is_broken, marks.differ, *words])])
    dist.all_reduce(told)
    sums, (broken, differing, *words) = told[: len(values)].tolist(), told[len(values) :].tolist()
    if broken:
        groups.commit()  # In vain, which has the groups meet anew.
        return None, words
    if differing:
        raise TrainingStopped(
            "the replica groups differ in their code, their settings, their step or in where experts are: their "
            "gradients cannot be summed; start the run again, with the same code and settings on all machines"
        )
    return sums, words
