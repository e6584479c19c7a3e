"""All meshes, derived and validated in one place (docs/design.md, "Mesh and gradients")."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["LayoutError", "ParallelDims", "ParallelismConfig"]

AUTO = -1


@dataclass(frozen=True)
class ParallelismConfig:
    """`[parallelism]`: how many ranks each dimension of the layout takes."""

    data_parallel_replicate_degree: int = 1
    """Replicas of the sharded model (HSDP). Only 1 so far."""
    data_parallel_shard_degree: int = AUTO
    """Ranks that share the parameters (FSDP); -1 takes what the other degrees leave."""
    context_parallel_degree: int = 1
    """Ranks that share a sequence. Only 1 so far."""
    tensor_parallel_degree: int = 1
    """Ranks that share a matrix. Only 1 so far."""
    pipeline_parallel_degree: int = 1
    """Pipeline stages. Only 1 so far."""
    expert_parallel_degree: int = 1
    """Ranks that together hold all experts; must divide the ranks. -1 is 2 where their number is even, else 1."""
    reshard_after_forward: bool = True
    """Free a layer's gathered parameters after its forward pass: less memory, one more gather."""


class LayoutError(ValueError):
    """A layout that cannot work. `field` is the `[parallelism]` key, `value` what it holds, `valid` what would do."""

    def __init__(self, field: str, value: int, valid: str) -> None:
        super().__init__(field, value, valid)
        self.field, self.value, self.valid = field, value, valid

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.valid}"


@dataclass(frozen=True)
class ParallelDims:
    """World = `pp x dp_replicate x dp_shard x cp x tp`; experts see the same ranks as `ep_replicate x ep_shard x ep`.

    `ep_shard x ep = dp_shard x cp x tp`, `ep` innermost, so that experts travel over the fastest links.

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
        for name, degree in (
            ("data_parallel_replicate_degree", self.dp_replicate),
            ("context_parallel_degree", self.cp),
            ("tensor_parallel_degree", self.tp),
            ("pipeline_parallel_degree", self.pp),
        ):
            if degree != 1:
                raise LayoutError(name, degree, "only 1 is supported so far")
        if self.dp_shard == AUTO:
            object.__setattr__(self, "dp_shard", self.world_size)
        if self.dp_shard != self.world_size:
            raise LayoutError(
                "data_parallel_shard_degree", self.dp_shard, f"must be {self.world_size}, the number of ranks, or -1"
            )
        if self.ep == AUTO:
            object.__setattr__(self, "ep", 2 if self.world_size % 2 == 0 else 1)
        if self.ep < 1 or self.world_size % self.ep:
            divisors = [str(d) for d in range(1, self.world_size + 1) if self.world_size % d == 0]
            raise LayoutError(
                "expert_parallel_degree",
                self.ep,
                f"must divide the number of ranks, {self.world_size}: {', '.join(divisors)} (or -1)",
            )

    @property
    def ep_shard(self) -> int:
        """Ranks that hold the same experts, sharded."""
        return self.dp_shard * self.cp * self.tp // self.ep

    def build_mesh(self, device_type: str, timeout: timedelta | None = None) -> DeviceMesh:
        """The mesh `(ep_shard, ep)`; dense parameters live on all its ranks. Collective, after init_process_group.

        Args:
            device_type: `cpu` or `cuda`.
            timeout: of every collective in the mesh's groups; torch's default if `None`.
        """
        grid = torch.arange(self.world_size).view(self.ep_shard, self.ep)
        # init_device_mesh would give its groups torch's default time-out, whatever the default group's is.
        groups = [
            cast(dist.ProcessGroup, dist.new_subgroups_by_enumeration(ranks, timeout=timeout)[0])
            for ranks in (grid.t().tolist(), grid.tolist())
        ]
        return DeviceMesh.from_group(groups, device_type, mesh=grid, mesh_dim_names=("ep_shard", "ep"))
