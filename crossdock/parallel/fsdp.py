"""FSDP2 over two meshes: experts over `ep_shard`, the rest over `fsdp` and its replicas; every reduction a sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from crossdock.experts import GroupedExperts, UnpackedExperts
from crossdock.moe import moe_layers
from crossdock.parallel.blocks import transformer_blocks
from crossdock.parallel.mesh import Meshes
from crossdock.routed_experts import RoutedExperts

__all__ = ["apply_fsdp"]


def apply_fsdp(
    model: nn.Module,
    meshes: Meshes,
    *,
    param_dtype: torch.dtype | None = None,
    blocks: list[nn.Module] | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> nn.Module:
    """Shard `model` in place: each parameter in exactly one FSDP group, gradients summed over its ranks, never divided.

    Replicas of dense parameters are reduced by FSDP (HSDP); those of experts by a `GradientManager`, once per step.

    Args:
        model: with expert parallelism applied, where it is wanted.
        meshes: from `ParallelDims.build_mesh`.
        param_dtype: dtype of computation (bf16 mixed precision); parameters and reductions keep theirs.
        blocks: modules that are gathered as a unit; by default the entries of the outermost `nn.ModuleList`s.
        reshard_after_forward: free gathered parameters after a block's forward pass.
        cpu_offload: keep parameters, gradients and the optimizer's state in the machine's memory.

    Returns:
        `model`.

    Raises:
        ValueError: for another mesh, or if an expert's matrix does not divide evenly over `ep_shard`.
    """
    if not isinstance(meshes, Meshes):
        raise ValueError(f"meshes must come from ParallelDims.build_mesh, not be a {type(meshes).__name__}")
    expert_modules = [m for m in model.modules() if isinstance(m, GroupedExperts | UnpackedExperts)]
    _check_even(expert_modules, meshes["ep_shard"].size())
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype is not None else None
    )
    offload = CPUOffloadPolicy(pin_memory=meshes.dense.device_type != "cpu") if cpu_offload else OffloadPolicy()
    dense_mesh = meshes.dense["dp_replicate", "fsdp"] if meshes.size("dp_replicate") > 1 else meshes["fsdp"]
    sharding = _expert_sharding(meshes)
    # Modules are sharded as dense parameters are, unevenly where need be; of rows for slots, the next dimension.
    dims = {parameter: 0 for module in expert_modules for parameter in module.parameters()}
    dims |= {parameter: 1 for module in expert_modules for parameter in module.slot_parameters().values()}
    if sharding is None:
        # The experts' inputs hold fp32 routing weights, which FSDP would cast along with the tokens.
        expert_policy = dataclasses.replace(policy, cast_forward_inputs=False)
        for experts in expert_modules:
            fully_shard(
                experts,
                mesh=meshes["ep_shard"],
                mp_policy=expert_policy,
                offload_policy=offload,
                reshard_after_forward=reshard_after_forward,
                shard_placement_fn=lambda parameter: Shard(dims[parameter]),
            )

    def sharding_of(parameter: nn.Parameter) -> Any:
        return None if sharding is None or parameter not in dims else sharding(dims[parameter])

    units = transformer_blocks(model) if blocks is None else blocks
    for unit in [*units, model]:
        fully_shard(
            unit,
            mesh=dense_mesh,
            mp_policy=policy,
            offload_policy=offload,
            # The root's are wanted again at once, in the backward pass.
            reshard_after_forward=reshard_after_forward and unit is not model,
            shard_placement_fn=sharding_of,
        )
    _prefetch(units)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no division within a reduction, so that the sum must be asked for as well.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for module in expert_modules:
        if isinstance(module, UnpackedExperts):
            module.mark()
    replicas = meshes.size("ep_replicate")
    for layer in moe_layers(model).values():
        layer.is_first_replica = replicas == 1 or meshes["ep_replicate"].get_local_rank() == 0
        layer.sums_replicas = replicas == 1
        if not layer.sums_replicas:
            for parameter in layer.experts.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(_refuse_unsummed, layer, replicas))
    return model


def _prefetch(units: Sequence[Any]) -> None:
    """Have each block gather the next one's parameters, its experts' included, before it computes; backward likewise.

    FSDP by itself gathers ahead as far as the host is ahead of the device; in an MoE layer the host waits for the
    number of tokens that arrive, so that it never is.
    """
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])


def _refuse_unsummed(layer: RoutedExperts, size: int, parameter: nn.Parameter) -> None:
    """Replicas whose gradients nobody sums would drift apart unseen."""
    if not layer.sums_replicas:
        raise RuntimeError(
            f"experts have {size} replicas (dp_replicate), whose gradients are summed by a GradientManager: make one "
            "after apply_fsdp or parallelize, and take its steps"
        )


def _expert_sharding(meshes: Meshes) -> Callable[[int], Any] | None:
    """What `shard_placement_fn` returns for experts that are sharded over a dimension of theirs, as a function of that.

    `None` where this torch cannot mix meshes in one FSDP group.

    One `fully_shard` per block gathers dense parameters and experts side by side; a nested one costs hooks and, where
    experts are checkpointed, records that selective recompute does not find again.
    """
    if all(meshes.size(name) == 1 for name in ("ep", "ep_replicate", "tp")):  # the same ranks
        return lambda dim: Shard(dim)
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    except ImportError:  # torch < 2.13
        return None
    mesh_info = FSDPMeshInfo(meshes["ep_shard"], shard_mesh_dim=0)
    return lambda dim: ShardPlacementResult(Shard(dim), mesh_info)


def _check_even(expert_modules: list[GroupedExperts | UnpackedExperts], ep_shard: int) -> None:
    for module in expert_modules:
        for name, parameter in module.slot_parameters().items():
            if parameter.shape[1] % ep_shard:
                raise ValueError(
                    f"{name} {tuple(parameter.shape)}: dimension 1 must be divisible by ep_shard ({ep_shard}); "
                    "choose another expert_parallel_degree or number of ranks"
                )
