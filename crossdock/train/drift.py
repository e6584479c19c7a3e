"""Whether ranks that should hold the same still do: parameters, buffers, the optimizer's states (docs/numbers.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from crossdock.checkpoint import in_short
from crossdock.experts import UnpackedExperts, ranks_apart
from crossdock.parallel import Meshes, local_part, plain_name
from crossdock.train.together import TrainingStopped

__all__ = ["Difference", "ReplicaCheck", "digest"]

# The ranks of a pipeline stage, seen twice (docs/design.md, "Mesh and gradients").
_VIEWS = (("dp_replicate", "fsdp", "tp"), ("ep_replicate", "ep_shard", "ep"))
# A view, and the dimensions of it along which ranks hold different parts of a tensor.
_Kind = tuple[int, frozenset[str]]
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 2**20
_FACTOR = 6364136223846793005  # Odd, as all that multiplies a digest: nothing is lost modulo 2^64.


class Difference(NamedTuple):
    """A tensor that ranks should hold alike, and those of these ranks that do, the most first."""

    name: str
    ranks: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        alike = [f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for ranks in self.ranks]
        if len(self.ranks) == sum(map(len, self.ranks)):
            return f"{self.name} differs between {' and '.join(alike)}"
        return f"{self.name} of {', of '.join(alike[1:])} differs from that of {alike[0]}"


class ReplicaCheck:
    """Compares what several ranks hold of a tensor: replicas, whether by a layout (`Replicate`) or because there is no
    other, of parameters, buffers that belong in a checkpoint, and the optimizer's states. By bits, not by values.

    Args:
        model: on its layout.
        optimizer: with its states.
        meshes: the layout.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, meshes: Meshes) -> None:
        self._model, self._optimizer = model, optimizer
        world_size, pp = dist.get_world_size(), meshes.size("pp")
        # For each way that tensors can be apart, which ranks hold the same: a number for each such set, of every rank.
        self._sets: dict[_Kind, list[int]] = {}
        for view, names in enumerate(_VIEWS):
            grid = torch.arange(world_size).view(pp, *(meshes.size(name) for name in names))
            for mask in range(2 ** len(names)):
                apart = frozenset(name for bit, name in enumerate(names) if mask >> bit & 1)
                kept = [0, *(dim + 1 for dim, name in enumerate(names) if name in apart)]
                shared = [dim for dim in range(grid.ndim) if dim not in kept]
                # A set is known by its first rank.
                first = grid.amin(dim=shared, keepdim=True) if shared else grid
                self._sets[view, apart] = first.expand_as(grid).flatten().tolist()
        self._last_alike = 0

    def after_step(self, step: int, interval: int, checkpoints: Path) -> None:
        """Look, where that is due. Collective.

        Args:
            step: the one that was done.
            interval: steps between looks; 0: never.
            checkpoints: the folder of the run's, for the message.

        Raises:
            TrainingStopped: on all ranks, naming what differs.
        """
        if not interval or step % interval:
            return
        if found := self.differences():
            before = f"after step {self._last_alike}, when all were alike" if self._last_alike else "of this run"
            raise TrainingStopped(
                f"step {step}: what these ranks should hold alike differs: {in_short([str(each) for each in found])}. "
                "The memory, processor or links of one of them may be faulty: leave that machine out, remove the "
                f"folders of {checkpoints} that were written {before}, and start again. "
                f"fault_tolerance.replica_check_interval = {interval} sets when ranks are compared."
            )
        self._last_alike = step

    @torch.no_grad()
    def differences(self) -> list[Difference]:
        """What differs; the same list on all ranks. Collective over the default group: one all-gather of 128 bytes,
        and of names and digests where something does differ."""
        kinds = list(self._sets)
        of_tensors: dict[_Kind, dict[str, Tensor]] = {kind: {} for kind in kinds}
        device = torch.device("cpu")
        for name, tensor, kind in self._tensors():
            if len(set(self._sets[kind])) < len(self._sets[kind]):
                of_tensors[kind][name] = digest(tensor)
                device = of_tensors[kind][name].device
        zero = torch.zeros((), dtype=torch.int64, device=device)
        own = torch.stack([_joined(list(of_tensors[kind].values()), zero) for kind in kinds])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        gathered = torch.stack(everyone).t().tolist()
        odd = [kind for kind, column in zip(kinds, gathered, strict=True) if _odd_sets(self._sets[kind], column)]
        if not odd:
            return []
        named = {kind: {name: int(value) for name, value in of_tensors[kind].items()} for kind in odd}
        of_ranks: list[dict[_Kind, dict[str, int]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, named)
        found = []
        for kind in odd:
            for name in dict.fromkeys(name for each in of_ranks for name in each[kind]):
                # A rank of another stage, or without these experts, has no such tensor.
                column = [each[kind].get(name) for each in of_ranks]
                found += [Difference(name, ranks) for ranks in _odd_sets(self._sets[kind], column)]
        return found

    def _tensors(self) -> Iterator[tuple[str, Tensor, _Kind]]:
        """All by name, in one order on all ranks that hold the same, with how they are apart."""
        # First, since it makes FSDP shard again what a forward pass has left gathered.
        persistent = self._model.state_dict().keys()
        for name, parameter in self._model.named_parameters():
            kind = _kind(parameter)
            yield plain_name(name), parameter, kind
            for key, state in sorted(self._optimizer.state.get(parameter, {}).items()):
                yield f"{key} of {plain_name(name)}", state, kind
        unpacked = [module for module in self._model.modules() if isinstance(module, UnpackedExperts)]
        of_experts = {buffer for experts in unpacked for buffer in experts.buffers()}
        for name, buffer in self._model.named_buffers():
            if plain_name(name) in persistent:
                yield plain_name(name), buffer, (1, frozenset({"ep"} if buffer in of_experts else ()))


def digest(tensor: Tensor) -> Tensor:
    """64 bits (int64) of this rank's part of a tensor, on its device: each word times an odd number that hangs on its
    place, summed, which is linear, so that a single bit that differs always shows.

    Takes the memory of some 2^20 words at a time.
    """
    local = local_part(tensor.detach())
    words = local.contiguous().flatten().view(_WORDS[local.element_size()]) if local.numel() else local.flatten()
    result = torch.full((), local.numel(), dtype=torch.int64, device=local.device)
    factors = _factors(min(_BLOCK, words.numel()), local.device)
    for block in words.split(_BLOCK) if words.numel() else ():
        result = result * _FACTOR + (block.to(torch.int64) * factors[: block.numel()]).sum()
    return result


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers, one for each place."""
    places = torch.arange(1, count + 1, device=device) * _FACTOR
    return (places ^ (places >> 29)) * 2 + 1


def _joined(digests: list[Tensor], zero: Tensor) -> Tensor:
    """One digest of several."""
    if not digests:
        return zero
    values = torch.stack([value.to(zero.device) for value in digests])
    return (values * _factors(len(values), values.device)).sum()


def _kind(parameter: Tensor) -> _Kind:
    """In which view of the ranks a parameter has parts, and the dimensions along which ranks hold different ones."""
    apart: set[str] = set()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        placements = zip(names, parameter.placements, strict=True)
        apart = {name for name, placement in placements if not isinstance(placement, Replicate)}
    if isinstance(parameter, nn.Parameter) and ranks_apart(parameter) > 1:
        apart.add("ep")
    view = 1 if apart & set(_VIEWS[1]) else 0
    return view, frozenset(apart)


def _odd_sets(sets: list[int], values: list[int | None]) -> list[tuple[tuple[int, ...], ...]]:
    """For each set of ranks that should have one value and have several: those that have the same, the most first."""
    found = []
    for number in dict.fromkeys(sets):
        alike: dict[int, list[int]] = {}
        for rank, value in enumerate(values):
            if sets[rank] == number and value is not None:
                alike.setdefault(value, []).append(rank)
        if len(alike) > 1:
            most_first = sorted(alike.values(), key=lambda ranks: (-len(ranks), ranks))
            found.append(tuple(map(tuple, most_first)))
    return found
