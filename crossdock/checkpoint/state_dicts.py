"""State dicts in memory, between Hugging Face's names and ours; aware of DTensors.

    state = from_hf(state_dict, keys, num_experts, mesh)   # what a model of ours loads, on this rank
    model.load_state_dict(state)
    state_dict = to_hf(model.state_dict(), keys, num_experts)

`keys` is a family's: `crossdock.models.FAMILIES["qwen3"].hf_keys`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from crossdock.checkpoint.experts import expert_rows
from crossdock.checkpoint.folders import CheckpointError
from crossdock.checkpoint.hf import HFKeys, Part
from crossdock.experts import ExpertParams, halves_apart, halves_interleaved
from crossdock.parallel import as_shard
from crossdock.placement import EMPTY
from crossdock.placement import Placement as ExpertPlacement

__all__ = ["expert_range", "from_hf", "to_hf", "validate_experts"]

_SHOWN = 8


def expert_range(num_experts: int, mesh: DeviceMesh | None) -> range:
    """The logical experts `g*E//R .. (g+1)*E//R - 1` of this rank, which is `g` of the `R` ranks of `ep`.

    Args:
        num_experts: `E`.
        mesh: of one dimension, or with one named `ep`; `None` for one rank.
    """
    held = [expert for expert in _own_slots(num_experts, mesh) if expert != EMPTY]
    return range(held[0], held[-1] + 1) if held else range(0)


def validate_experts(
    state_dict: Mapping[str, Tensor], keys: HFKeys, num_experts: int, mesh: DeviceMesh | None = None
) -> None:
    """Check that a state dict with Hugging Face's names holds all of this rank's experts, of every layer in it.

    Args:
        state_dict: may lack the experts of other ranks.
        keys: of its family.
        num_experts: `E`.
        mesh: as in `expert_range`.

    Raises:
        CheckpointError: naming what is missing, or that there is no expert at all.
    """
    layers = _layers(state_dict, keys)
    if not layers:
        raise CheckpointError(f"the state dict holds no expert: no name ends like {keys.down.format(0)!r}")
    missing = [
        part.name
        for layer in layers
        for parameter in _parameters(state_dict, keys, layer)
        for expert in expert_range(num_experts, mesh)
        for part in keys.parts(f"{layer}.{parameter}", expert, (0, 0))
        if part.name not in state_dict
    ]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(f"the state dict lacks {', '.join(missing[:_SHOWN])}{more}")


@torch.no_grad()
def from_hf(
    state_dict: Mapping[str, Tensor], keys: HFKeys, num_experts: int, mesh: DeviceMesh | None = None
) -> dict[str, Tensor]:
    """Our names and layout for a state dict with Hugging Face's.

    An expert's matrices become a row of `gate_and_up_projs [P/R, H, 2I]` and `down_projs [P/R, I, H]`. With `mesh`
    these are DTensors, `Shard(0)` over `ep` and `Shard(1)` over `ep_shard`, as in a model on that mesh; slots without
    an expert are 0. All else keeps its value.

    Args:
        state_dict: this rank's experts at least. A DTensor is gathered, a matrix at a time; collective then.
        keys: of its family.
        num_experts: `E`.
        mesh: with a dimension `ep`, and `ep_shard` where experts are sharded; or of one dimension, which is `ep`.

    Raises:
        CheckpointError: where an expert of this rank is missing.
    """
    validate_experts(state_dict, keys, num_experts, mesh)
    own = _own_slots(num_experts, mesh)
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for layer in _layers(state_dict, keys):
        for parameter in _parameters(state_dict, keys, layer):
            name = f"{layer}.{parameter}"
            rows: list[Tensor | None] = []
            for expert in own:
                parts = keys.parts(name, max(expert, 0), (0, 0))
                rows.append(None if expert == EMPTY else _row(state_dict, parts))
            like = next(row for row in rows if row is not None)
            stacked = torch.stack([torch.zeros_like(like) if row is None else row for row in rows])
            result[name] = stacked if mesh is None else _distributed(stacked, mesh)
        used |= _names_of(state_dict, keys, layer)
    return result | {keys.ours(name): tensor for name, tensor in state_dict.items() if name not in used}


@torch.no_grad()
def to_hf(state_dict: Mapping[str, Tensor], keys: HFKeys, num_experts: int) -> dict[str, Tensor]:
    """Hugging Face's names for a model's state dict: one tensor per expert, or packed, as the family has it.

    Each rank has its own experts, sharded over `ep_shard` where they are; views where that can be. Where the family
    packs them, each rank has them all: collective then. All else keeps its value.

    Args:
        state_dict: of a model of ours, on any layout.
        keys: of its family.
        num_experts: `E`.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        layer, _, parameter = name.rpartition(".")
        if parameter not in ExpertParams._fields or not layer.endswith("experts"):
            result[keys.parts(name, None, ())[0].name] = tensor
        elif keys.packed:
            (part,) = keys.parts(name, 0, tensor.shape[1:])
            slots = ExpertPlacement.contiguous(num_experts, _ep_of(tensor)[0]).expert_to_slot
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole = whole[torch.tensor(slots, device=whole.device)]
            result[part.name] = halves_interleaved(whole) if part.interleaved else whole
        else:
            size, rank = _ep_of(tensor)
            own = ExpertPlacement.contiguous(num_experts, size).experts_on(rank)
            for expert, row in zip(own, expert_rows(tensor), strict=True):
                for part in keys.parts(name, expert, row.shape) if expert != EMPTY else ():
                    piece = row if part.columns is None else row[:, part.columns]
                    result[part.name] = piece.t() if part.transposed else piece
    return result


def _layers(names: Iterable[str], keys: HFKeys) -> list[str]:
    """Our names of the modules that hold experts, of all that `names` tell of."""
    pattern = re.escape(keys.down).replace(re.escape("{}"), r"\d+")
    if keys.packed:
        pattern = "down_proj"
    found = (re.fullmatch(rf"(.+\.){pattern}", name) for name in names)
    return list(dict.fromkeys(keys.ours(match[1]).removesuffix(".") for match in found if match))


def _parameters(state_dict: Mapping[str, Tensor], keys: HFKeys, layer: str) -> list[str]:
    """Which of the experts' parameters a family has: biases are not in all."""
    return [
        parameter
        for parameter in ExpertParams._fields
        if not parameter.endswith("bias")
        or (keys.packed and keys.parts(f"{layer}.{parameter}", 0, (0, 0))[0].name in state_dict)
    ]


def _names_of(state_dict: Mapping[str, Tensor], keys: HFKeys, layer: str) -> set[str]:
    """All names of a layer's experts, those of other ranks too."""
    module = keys.theirs(f"{layer}.")
    if keys.packed:
        return {keys.parts(f"{layer}.{parameter}", 0, (0, 0))[0].name for parameter in ExpertParams._fields}
    return {name for name in state_dict if re.match(rf"{re.escape(module)}\d+\.", name)}


def _row(state_dict: Mapping[str, Tensor], parts: list[Part]) -> Tensor:
    """An expert's row of a parameter."""
    pieces = []
    for part in parts:
        value = state_dict[part.name]
        value = value.full_tensor() if isinstance(value, DTensor) else value
        value = value if part.expert is None else value[part.expert]
        value = halves_apart(value) if part.interleaved else value
        pieces.append(value.t() if part.transposed else value)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _distributed(stacked: Tensor, mesh: DeviceMesh) -> DTensor:
    """The rows of this rank `[P/R, ...]` as its part of an expert parameter on `mesh`."""
    names = mesh.mesh_dim_names or ("ep",)
    placements: list[Placement] = [Shard(0)]
    if len(names) > 1:
        placements = [Shard(1) if name == "ep_shard" else Shard(0) for name in names]
    sharding, size = mesh["ep_shard"] if len(names) > 1 else None, stacked.shape
    shape = torch.Size((size[0] * _ep_mesh(mesh).size(), *size[1:]))
    if sharding is not None:
        if size[1] % sharding.size():
            raise CheckpointError(
                f"dimension 1 of experts {list(size)} must be divisible by ep_shard, {sharding.size()}"
            )
        stacked = stacked.chunk(sharding.size(), dim=1)[sharding.get_local_rank()].contiguous()
    return as_shard(stacked, mesh, tuple(placements), shape)


def _own_slots(num_experts: int, mesh: DeviceMesh | None) -> tuple[int, ...]:
    if mesh is None:
        return tuple(range(num_experts))
    ep = _ep_mesh(mesh)
    return ExpertPlacement.contiguous(num_experts, ep.size()).experts_on(ep.get_local_rank())


def _ep_mesh(mesh: DeviceMesh) -> DeviceMesh:
    if mesh.ndim > 1 and "ep" not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"the mesh must have a dimension ep, not {mesh.mesh_dim_names}; see ParallelDims")
    return mesh["ep"] if mesh.ndim > 1 else mesh


def _ep_of(tensor: Tensor) -> tuple[int, int]:
    """How many ranks an expert parameter is spread over, and which of them this is."""
    if not isinstance(tensor, DTensor) or Shard(0) not in tensor.placements:
        return 1, 0
    dim = tensor.placements.index(Shard(0))
    return tensor.device_mesh.size(dim), tensor.device_mesh.get_local_rank(dim)
