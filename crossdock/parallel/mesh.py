"""All meshes, derived and validated in one place (docs/design.md, "Mesh and gradients")."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "ContextMethod",
    "GradientReduction",
    "LayoutError",
    "Meshes",
    "ParallelDims",
    "ParallelismConfig",
    "PipelineSchedule",
    "Reader",
    "ReshardPolicy",
    "nearest",
]

AUTO = -1

ContextMethod = Literal["ulysses", "ring"]
"""How ranks that share sequences attend: heads are exchanged, or keys and values go round."""

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"]
"""The order in which the stages of a pipeline compute micro-batches."""

ReshardPolicy = Literal["auto", "always", "never"]
"""Whether FSDP frees gathered parameters after the forward pass."""

GradientReduction = Literal["micro_batch", "step", "auto"]


@dataclass(frozen=True)
class ParallelismConfig:
    """`[parallelism]`: how many ranks each dimension of the layout takes."""

    data_parallel_replicate_degree: int = 1
    """Replicas of the sharded model (HSDP)."""
    data_parallel_shard_degree: int = AUTO
    """Ranks that share the parameters (FSDP); -1 takes what the other degrees leave."""
    context_parallel_degree: int = 1
    """Ranks that share a sequence, each with a part of it; must divide training.seq_len."""
    context_parallel_method: ContextMethod = "ulysses"
    """What those ranks exchange: heads for positions, for any attention but linear; or keys and values in a ring, for
    plain causal attention, whatever the number of heads."""
    tensor_parallel_degree: int = 1
    """Ranks that share a matrix."""
    sequence_parallel: bool = True
    """Between the modules that these split, each has a part of every sequence; else all have the same tokens."""
    pipeline_parallel_degree: int = 1
    """Ranks that share a model's blocks, each with stages of a pipeline."""
    pipeline_parallel_schedule: PipelineSchedule = "1f1b"
    """In which order they compute micro-batches. interleaved_1f1b has several stages on each rank; zero_bubble and zbv
    (two stages on each rank) compute the gradients of weights when there is nothing else to do."""
    pipeline_parallel_stages_per_rank: int = AUTO
    """-1 is 2 with interleaved_1f1b and zbv, else 1."""
    expert_parallel_degree: int = 1
    """Ranks that together hold all experts; must divide the ranks of a replica. -1 is 2 where their number is even,
    else 1."""
    reshard_after_forward: ReshardPolicy = "auto"
    """Whether a block's gathered parameters are freed after its forward pass: less memory, one more gather. auto frees
    them unless these are stages of a pipeline, which gather once per step."""
    gradient_reduction: GradientReduction = "micro_batch"
    """When gradients are reduced over the ranks that share parameters: with each micro-batch, or once per step, which
    keeps whole gradients meanwhile. auto: once per step where that is estimated to fit and to be faster
    (docs/plan.md)."""
    sparse_replica_gradients: bool = True
    """Leave out experts that no rank had tokens for where replicas sum gradients."""

    @property
    def reshards(self) -> bool:
        """What `reshard_after_forward` comes to."""
        choice = self.reshard_after_forward
        return choice == "always" or (choice == "auto" and self.pipeline_parallel_degree == 1)


class LayoutError(ValueError):
    """A layout that cannot work. `field` is the `[parallelism]` key, `value` what it holds, `valid` what would do."""

    def __init__(self, field: str, value: int, valid: str) -> None:
        super().__init__(field, value, valid)
        self.field, self.value, self.valid = field, value, valid

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.valid}"


@dataclass(frozen=True)
class ParallelDims:
    """World = `pp x dp_replicate x dp_shard x cp x tp`; experts see the same ranks as
    `pp x ep_replicate x ep_shard x ep`.

    `ep_shard x ep = dp_shard x cp x tp`, the last dimension innermost in both, so that experts travel over the fastest
    links; `ep_replicate = dp_replicate`.

    Raises:
        LayoutError: for degrees that do not fit one another or the world.
    """

    world_size: int
    dp_replicate: int = 1
    dp_shard: int = AUTO
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @classmethod
    def from_config(cls, config: ParallelismConfig, world_size: int) -> ParallelDims:
        return cls(
            world_size,
            dp_replicate=config.data_parallel_replicate_degree,
            dp_shard=config.data_parallel_shard_degree,
            cp=config.context_parallel_degree,
            tp=config.tensor_parallel_degree,
            pp=config.pipeline_parallel_degree,
            ep=config.expert_parallel_degree,
        )

    def __post_init__(self) -> None:
        left = self.world_size
        for name, degree in (
            ("pipeline_parallel_degree", self.pp),
            ("tensor_parallel_degree", self.tp),
            ("context_parallel_degree", self.cp),
            ("data_parallel_replicate_degree", self.dp_replicate),
        ):
            what = "the number of ranks" if left == self.world_size else "the ranks that the other degrees leave"
            _check_divides(name, degree, left, what)
            left //= degree
        if self.dp_shard == AUTO:
            object.__setattr__(self, "dp_shard", left)
        if self.dp_shard != left:
            others = "" if left == self.world_size else " over the product of the other degrees"
            raise LayoutError(
                "data_parallel_shard_degree",
                self.dp_shard,
                f"must be {left}, the number of ranks ({self.world_size}){others}, or -1",
            )
        if self.ep == AUTO:
            object.__setattr__(self, "ep", 2 if self.replica_size % 2 == 0 else 1)
        whole = self.replica_size == self.world_size
        what = "the number of ranks" if whole else "dp_shard x cp x tp, the ranks of a replica"
        _check_divides("expert_parallel_degree", self.ep, self.replica_size, what, or_auto=True)

    @property
    def replica_size(self) -> int:
        """Ranks that share one copy of a pipeline stage, dense parameters and experts alike."""
        return self.dp_shard * self.cp * self.tp

    @property
    def ep_shard(self) -> int:
        """Ranks that hold the same experts, sharded."""
        return self.replica_size // self.ep

    def __str__(self) -> str:
        degrees = {"pp": self.pp, "dp_replicate": self.dp_replicate, "cp": self.cp, "tp": self.tp}
        used = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
        return ", ".join([*used, f"ep {self.ep}", f"ep_shard {self.ep_shard}"])

    def reader(self, rank: int) -> Reader:
        """Which part of the data a rank reads. Those that share a sequence, or are other stages, read the same."""
        within, apart = rank % (self.world_size // self.pp), self.cp * self.tp
        return Reader(
            within // apart,
            self.dp_replicate * self.dp_shard,
            within // self.tp % self.cp,
            self.cp,
            is_first=within % apart == 0 and within == rank,
            counts_section=within % self.tp == 0 and within == rank,
        )

    def build_mesh(self, device_type: str, timeout: timedelta | None = None) -> Meshes:
        """The ranks as parameters and tokens see them. Collective, after init_process_group.

        Args:
            device_type: `cpu` or `cuda`.
            timeout: of every collective in the meshes' groups; torch's default if `None`.
        """

        def mesh(always: Sequence[str], **degrees: int) -> DeviceMesh:
            # Groups of a single rank would cost threads and connections for nothing.
            sizes = {name: degree for name, degree in degrees.items() if degree > 1 or name in always}
            # init_device_mesh would give its groups torch's default time-out, whatever the default group's is.
            grid = torch.arange(self.world_size).view(*sizes.values())
            groups = [_group(grid, [dim], timeout) for dim in range(grid.ndim)]
            return DeviceMesh.from_group(groups, device_type, mesh=grid, mesh_dim_names=tuple(sizes))

        grid = torch.arange(self.world_size).view(self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)
        return Meshes(
            mesh(["fsdp"], pp=self.pp, dp_replicate=self.dp_replicate, fsdp=self.dp_shard * self.cp, tp=self.tp),
            mesh(["ep_shard", "ep"], pp=self.pp, ep_replicate=self.dp_replicate, ep_shard=self.ep_shard, ep=self.ep),
            cp=_group(grid, [3], timeout) if self.cp > 1 else None,
            sequence=_group(grid, [3, 4], timeout) if self.cp * self.tp > 1 else None,
            stage=_group(grid, [1, 2, 3, 4], timeout) if self.pp * self.dp_replicate > 1 else None,
        )


class Reader(NamedTuple):
    """What a rank reads of the data.

    Attributes:
        rank: which of `degree` equal parts.
        degree: how many parts there are.
        section: which of `sections` equal sections of every sequence this rank computes on.
        sections: how many there are; 1 where ranks share no sequences.
        is_first: whether this rank is the one to count a part, among those that read the same.
        counts_section: likewise a section.
    """

    rank: int
    degree: int
    section: int
    sections: int
    is_first: bool
    counts_section: bool


@dataclass(frozen=True)
class Meshes:
    """The ranks, as parameters and tokens see them; `meshes[name]` is the mesh of one dimension.

    Dimensions of one rank are left out, but for `fsdp`, `ep_shard` and `ep`.

    Attributes:
        dense: `(pp, dp_replicate, fsdp, tp)`, with `fsdp = dp_shard x cp`.
        experts: `(pp, ep_replicate, ep_shard, ep)`.
        cp: the ranks that share a sequence in attention; `None` for one.
        sequence: all ranks that share sequences, `cp x tp`; `None` for one.
        stage: all ranks of this pipeline stage; `None` where these are one copy of the whole model.
    """

    dense: DeviceMesh
    experts: DeviceMesh
    cp: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None
    stage: dist.ProcessGroup | None = None

    @property
    def sequence_degree(self) -> int:
        """Ranks that share a sequence."""
        return 1 if self.sequence is None else self.sequence.size()

    def size(self, name: str) -> int:
        """Ranks of a dimension; 1 where it is left out."""
        names = (*(self.dense.mesh_dim_names or ()), *(self.experts.mesh_dim_names or ()))
        return self[name].size() if name in names else 1

    def __getitem__(self, name: str) -> DeviceMesh:
        return next(mesh[name] for mesh in (self.dense, self.experts) if name in (mesh.mesh_dim_names or ()))


def _group(grid: Tensor, dims: list[int], timeout: timedelta | None) -> dist.ProcessGroup:
    """This rank's group of those that differ in `dims` of `grid` alone."""
    ends = list(range(-len(dims), 0))
    size = math.prod(grid.shape[dim] for dim in dims)
    ranks = grid.movedim(dims, ends).reshape(-1, size).tolist()
    return cast(dist.ProcessGroup, dist.new_subgroups_by_enumeration(ranks, timeout=timeout)[0])


def _check_divides(field: str, degree: int, ranks: int, what: str, *, or_auto: bool = False) -> None:
    if degree >= 1 and ranks % degree == 0:
        return
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    auto = " (or -1)" if or_auto else ""
    fitting = f"{', '.join(map(str, divisors))}{auto}; the nearest is {nearest(degree, divisors)}"
    raise LayoutError(field, degree, f"must divide {what}, {ranks}: {fitting}")


def nearest(value: int, choices: Iterable[int]) -> int:
    """Of `choices` the one nearest to `value`; of two as near, the first."""
    return min(choices, key=lambda choice: abs(choice - value))
