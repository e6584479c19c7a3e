"""Expert parallelism: spread the experts of every MoE layer over the ranks of a mesh."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from crossdock.dispatch import Dispatcher, DispatchPlan, DispatchSituation, build_dispatcher, plan_dispatch
from crossdock.experts import GroupedExperts, UnpackedExperts
from crossdock.moe import moe_layer_places, moe_layers
from crossdock.parallel.mesh import Meshes
from crossdock.placement import EMPTY, Placement
from crossdock.routed_experts import RoutedExperts

__all__ = ["ExpertParallel", "apply_ep", "layer_dispatcher"]

logger = logging.getLogger(__name__)


class ExpertParallel(ParallelStyle):
    """A torch `ParallelStyle` for `MoE` modules: expert parameters become DTensors, `Shard(0)` over a 1-D mesh.

    Of experts that are modules, each rank keeps its own, whose parameters stay as they are.
    For `parallelize_module(model, mesh["ep"], {"layers.*.moe": ExpertParallel()})`; `apply_ep` finds the layers itself.
    Each rank keeps its own rows of the values it has; an initialised model must hold the same values on all ranks. On a
    mesh of one rank it changes nothing.

    Args:
        tokens_per_rank: of a forward pass, where it is known; for `dispatcher = "auto"`.
        dtype: of activations; the parameters' unless told. Likewise.
    """

    def __init__(self, tokens_per_rank: int | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.tokens_per_rank, self.dtype = tokens_per_rank, dtype

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, RoutedExperts):
            raise TypeError(f"ExpertParallel applies to crossdock.MoE, not {type(module).__name__}")
        if module.ep_world_size != 1:
            raise ValueError("expert parallelism has been applied to this layer already")
        if device_mesh.size() == 1:
            return module
        placement = Placement.contiguous(module.num_experts, device_mesh.size())
        dispatcher, plan = layer_dispatcher(module, device_mesh, self.tokens_per_rank, self.dtype)
        own = placement.experts_on(device_mesh.get_local_rank())
        if isinstance(module.experts, UnpackedExperts):
            module.experts.keep(own, device_mesh.size())
        else:
            _shard_rows(module.experts, own, device_mesh)
        module.place(placement, dispatcher, device_mesh.get_group(), plan)
        return module


def layer_dispatcher(
    layer: RoutedExperts,
    device_mesh: DeviceMesh,
    tokens_per_rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Dispatcher, DispatchPlan]:
    """What moves the tokens of a layer whose experts are spread over `device_mesh`, by `layer.config`, and why so.

    Args:
        layer: spread or not.
        device_mesh: of one dimension.
        tokens_per_rank: see `ExpertParallel`.
        dtype: likewise.
    """
    group, config = device_mesh.get_group(), layer.config
    options = config.dispatch_options()
    situation = DispatchSituation(
        device_mesh.size(),
        layer.num_experts,
        layer.top_k,
        layer.hidden_size,
        dtype or layer.example().dtype,
        torch.device(device_mesh.device_type),
        tokens_per_rank,
        tuple(dist.get_process_group_ranks(group)),
    )
    plan = plan_dispatch(config.dispatcher, config.overlap_chunks, situation, options)
    options = replace(options, overlap_chunks=plan.overlap_chunks)
    slots_per_rank = Placement.contiguous(layer.num_experts, device_mesh.size()).slots_per_rank
    return build_dispatcher(plan.dispatcher, group, slots_per_rank, options), plan


def _shard_rows(experts: GroupedExperts, own: tuple[int, ...], device_mesh: DeviceMesh) -> None:
    """Keep the rows of this rank's `own` experts of each parameter, one for each slot."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):
            raise TypeError(f"{name} is a DTensor already; apply expert parallelism first, FSDP afterwards")
        with torch.no_grad():
            rows = parameter.new_zeros(len(own), *parameter.shape[1:])
            for slot, expert in enumerate(own):
                if expert != EMPTY:
                    rows[slot] = parameter[expert]
        sharded = DTensor.from_local(rows, device_mesh, [Shard(0)], run_check=False)
        experts.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def apply_ep(
    model: nn.Module,
    mesh: DeviceMesh | Meshes | None,
    *,
    tokens_per_rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Spread the experts of every `MoE` in `model` over the dimension `ep` of `mesh`, in place.

    Does nothing where `mesh` is `None`, has no dimension `ep`, or `ep` is 1. Call it before FSDP.

    Args:
        model: any module that holds `crossdock.MoE` layers; initialised (its values are kept) or on the meta device.
        mesh: a device mesh with a dimension named `ep`, or those of `ParallelDims.build_mesh`.
        tokens_per_rank: see `ExpertParallel`.
        dtype: likewise.

    Returns:
        `model`.

    Raises:
        ValueError: if FSDP has wrapped the model already, or it has no MoE layer.
    """
    if isinstance(mesh, Meshes):
        mesh = mesh["ep"]
    if mesh is None or "ep" not in (mesh.mesh_dim_names or ()) or mesh["ep"].size() == 1:
        return model
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("the model is wrapped by FSDP already; call apply_ep before fully_shard or apply_fsdp")
    if not moe_layer_places(model).names:
        raise ValueError("the model has no crossdock.MoE layer to spread over ranks")
    layers = moe_layers(model)
    ep_mesh = mesh["ep"]
    for layer in layers.values():
        ExpertParallel(tokens_per_rank, dtype)._apply(layer, ep_mesh)
    logger.info(
        "expert parallelism: ep_size=%d ep_rank=%d layers=%d", ep_mesh.size(), ep_mesh.get_local_rank(), len(layers)
    )
    for layer in list(layers.values())[:1]:
        logger.info("dispatcher: %s", layer.dispatch_plan)
    return model
