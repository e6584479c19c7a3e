"""State dicts in memory, between Hugging Face's names and ours; aware of DTensors.

    state = from_hf(state_dict, keys, num_experts, mesh["ep"])   # what a model on that mesh loads, on this rank
    model.load_state_dict(state)
    state_dict = to_hf(model.state_dict(), keys, num_experts)

With FSDP, parameters beside the experts are DTensors, too, which no state dict of whole ones loads into; a checkpoint
in files goes into any layout (`HFCheckpoint.load`).

`keys` is a family's: `crossdock.models.FAMILIES["qwen3"].hf_keys`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from crossdock.checkpoint.experts import expert_rows
from crossdock.checkpoint.folders import CheckpointError, in_short
from crossdock.checkpoint.hf import HFKeys, Part
from crossdock.checkpoint.hf_files import DTYPES, QUANTIZED_DTYPES, Header
from crossdock.checkpoint.stored import Stored, stored_tensors
from crossdock.comm import raise_together
from crossdock.experts import ExpertParams, halves_apart
from crossdock.parallel import Meshes, as_shard, plain_name
from crossdock.placement import EMPTY
from crossdock.placement import Placement as ExpertPlacement

__all__ = ["expert_range", "from_hf", "to_hf", "validate_experts"]


def expert_range(num_experts: int, mesh: DeviceMesh | Meshes | None) -> range:
    """The logical experts `g*E//R .. (g+1)*E//R - 1` of this rank, which is `g` of the `R` ranks of `ep`.

    Args:
        num_experts: `E`.
        mesh: of one dimension, or with one named `ep`; `None` for one rank.
    """
    held = [expert for expert in _own_slots(num_experts, mesh) if expert != EMPTY]
    return range(held[0], held[-1] + 1) if held else range(0)


def validate_experts(
    state_dict: Mapping[str, Tensor], keys: HFKeys, num_experts: int, mesh: DeviceMesh | Meshes | None = None
) -> None:
    """Check that a state dict with Hugging Face's names holds all of this rank's experts, of every layer in it.

    Args:
        state_dict: may lack the experts of other ranks.
        keys: of its family.
        num_experts: `E`.
        mesh: as in `expert_range`.

    Raises:
        CheckpointError: naming what is missing, misshapen or cannot be read, or that there is no expert at all.
    """
    _checked_layers(_stored(state_dict), keys, num_experts, expert_range(num_experts, mesh))


@torch.no_grad()
def from_hf(
    state_dict: Mapping[str, Tensor], keys: HFKeys, num_experts: int, mesh: DeviceMesh | Meshes | None = None
) -> dict[str, Tensor]:
    """Our names and layout for a state dict with Hugging Face's.

    An expert's matrices become a row of `gate_and_up_projs [P/R, H, 2I]` and `down_projs [P/R, I, H]`. With `mesh`
    these are DTensors, `Shard(0)` over `ep` and `Shard(1)` over `ep_shard`, as in a model on that mesh; slots without
    an expert are 0. FP8 and MXFP4 become float32. All else keeps its value.

    Args:
        state_dict: this rank's experts at least; of a rank without experts, one of each layer, for its shape. Experts
            that are DTensors are gathered, a matrix at a time: collective then, on all ranks of the default group,
            and those that one is spread over all have it.
        keys: of its family.
        num_experts: `E`.
        mesh: with a dimension `ep`, and `ep_shard` where experts are sharded; or of one dimension, which is `ep`. With
            one it is collective among its ranks, who tell each other whether any has DTensors.

    Raises:
        CheckpointError: see `validate_experts`; on all ranks where there are DTensors.
    """
    stored, layers = dict[str, Stored](), dict[str, dict[str, int | None]]()
    error: Exception | None = None
    try:
        stored = _stored(state_dict)
        layers = _checked_layers(stored, keys, num_experts, expert_range(num_experts, mesh))
    except Exception as caught:  # noqa: BLE001 (of what is no tensor, too: others wait)
        error = caught
    is_distributed = _on_any_rank(any(isinstance(tensor, DTensor) for tensor in state_dict.values()), mesh)
    if is_distributed:
        raise_together(error)
        _check_alike(state_dict)
    elif error is not None:
        raise error
    own, memory = _own_slots(num_experts, mesh), _Memory(state_dict)
    result: dict[str, Tensor] = {}
    # In one order on all ranks, and what others need as well: gathering is collective.
    for layer, experts in sorted(layers.items()):
        names = sorted(name for name, expert in experts.items() if is_distributed or expert is None or expert in own)
        values = {}
        for name in names:
            value = stored[name].read(memory, [(0, size) for size in stored[name].shape])
            if experts[name] is None or experts[name] in own:
                values[name] = value
        some = stored[next(iter(experts))]
        dtype = DTYPES[some.dtype] if some.is_plain else torch.float32
        device = next(iter(state_dict.values())).device
        for parameter in _parameters(experts):
            parts = keys.parts(f"{layer}.{parameter}", _some_expert(experts), (0, 0))
            rows = [torch.zeros(_row_shape(stored, parts), dtype=dtype, device=device)] * len(own)
            for slot, expert in enumerate(own):
                if expert != EMPTY:
                    rows[slot] = _row(values, keys.parts(f"{layer}.{parameter}", expert, (0, 0)))
            stacked = torch.stack(rows)
            result[f"{layer}.{parameter}"] = stacked if mesh is None else _distributed(stacked, mesh)
    of_experts = {name for experts in layers.values() for name in experts}
    for name, tensor in sorted(stored.items()):
        if name not in of_experts:
            whole = [(0, size) for size in tensor.shape]
            result[keys.ours(name)] = state_dict[name] if tensor.is_plain else tensor.read(memory, whole)
    return result


@torch.no_grad()
def to_hf(
    state_dict: Mapping[str, Tensor],
    keys: HFKeys,
    num_experts: int,
    placements: Mapping[str, ExpertPlacement] | None = None,
) -> dict[str, Tensor]:
    """Hugging Face's names for a model's state dict: one tensor per expert, or packed, as the family has it.

    Each rank has its own experts, sharded over `ep_shard` where they are; views where that can be. Where the family
    packs them, each rank has them all: collective then. All else keeps its value.

    Args:
        state_dict: of a model of ours, on any layout.
        keys: of its family.
        num_experts: `E`.
        placements: where `crossdock.balance` has moved experts, `{name: layer.placement for name, layer in
            moe_layers(model).items()}`; without it, every rank has the experts that it began with.

    Raises:
        CheckpointError: for a number of experts that takes another number of rows.
    """
    placements = {plain_name(name): placement for name, placement in (placements or {}).items()}
    result: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        layer, _, parameter = name.rpartition(".")
        if parameter not in ExpertParams._fields or not layer.endswith("experts"):
            result[keys.parts(name, None, ())[0].name] = tensor
        elif keys.packed:
            placement = _placement(name, tensor, num_experts, placements)
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole = whole[torch.tensor(placement.expert_to_row, device=whole.device)]
            result |= {part.name: part.taken_from(whole) for part in keys.parts(name, 0, tensor.shape[1:])}
        else:
            own = _placement(name, tensor, num_experts, placements).experts_on(_ep_of(tensor)[1])
            for expert, row in zip(own, expert_rows(tensor), strict=True):
                if expert != EMPTY:
                    result |= {part.name: part.taken_from(row) for part in keys.parts(name, expert, row.shape)}
    return result


def _on_any_rank(value: bool, mesh: DeviceMesh | Meshes | None) -> bool:
    """Whether `value` is true on a rank of `mesh`. Collective among them."""
    if mesh is None or not dist.is_initialized():
        return value
    mesh = mesh.experts if isinstance(mesh, Meshes) else mesh
    for dim in range(mesh.ndim):
        values = [value] * mesh.size(dim)
        dist.all_gather_object(values, value, group=mesh.get_group(dim))
        value = any(values)
    return value


def _check_alike(state_dict: Mapping[str, Tensor]) -> None:
    """Raise on all ranks where one of them lacks a DTensor, or has another one: others would wait. Collective."""
    own: dict[tuple[int, ...], dict[str, str]] = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, DTensor):
            ranks = tuple(tensor.device_mesh.mesh.flatten().tolist())
            of_ranks = own.setdefault(ranks, {})
            of_ranks[name] = f"{tensor.dtype} {list(tensor.shape)} {list(tensor.placements)}"
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for ranks in sorted(set().union(*everyone)):
        held = {rank: everyone[rank].get(ranks, {}) for rank in ranks}
        for name in sorted(set().union(*held.values())):
            for rank in ranks:
                if name not in held[rank]:
                    raise CheckpointError(
                        f"the state dict of rank {rank} lacks {name}, a DTensor over the ranks {list(ranks)}"
                    )
                if held[rank][name] != held[ranks[0]][name]:
                    each = ", ".join(f"{held[one][name]} on rank {one}" for one in (ranks[0], rank))
                    raise CheckpointError(f"{name}, a DTensor over the ranks {list(ranks)}, is {each}")


class _Memory:
    """The tensors of a state dict, to be read as those of files are."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self.state_dict = state_dict

    def read(self, header: Header, bounds: Sequence[tuple[int, int]]) -> Tensor:
        """What lies within `bounds`, of each dimension; collective for a DTensor."""
        value = self.state_dict[header.name]
        if isinstance(value, DTensor) and header.dtype in QUANTIZED_DTYPES:
            # Bytes: gloo knows no such numbers.
            parts = value.to_local().view(torch.uint8)
            whole = as_shard(parts, value.device_mesh, value.placements, value.shape).full_tensor()
            value = whole.view(value.dtype)
        elif isinstance(value, DTensor):
            value = value.full_tensor()
        return value[tuple(slice(*ends) for ends in bounds)]


def _stored(state_dict: Mapping[str, Tensor]) -> dict[str, Stored]:
    """What the tensors stand for: quantised ones and their scales are one."""
    names = {dtype: name for name, dtype in {**DTYPES, **QUANTIZED_DTYPES}.items()}
    return stored_tensors(
        {
            name: Header(name, "", names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in state_dict.items()
        }
    )


def _checked_layers(
    stored: Mapping[str, Stored], keys: HFKeys, num_experts: int, own: range
) -> dict[str, dict[str, int | None]]:
    """By our name of each module of experts: the names of its tensors, and whose they are (`None`: of all experts).

    Raises CheckpointError for what does not fit, see `validate_experts`.
    """
    layers: dict[str, dict[str, int | None]] = {}
    for name in stored:
        if (place := keys.place_of(name)) is not None:
            layers.setdefault(place[0], {})[name] = place[1]
    if not layers:
        like = keys.theirs("experts.down_proj") if keys.packed else keys.down.format(0)
        raise CheckpointError(f"the state dict holds no expert: no name ends like {like!r}")
    problems = []
    for layer, experts in layers.items():
        for name, expert in experts.items():
            tensor = stored[name]
            if tensor.problem:
                problems.append(f"{name} {tensor.problem}")
            elif expert is None and tensor.shape[:1] != (num_experts,):
                problems.append(f"{name} has shape {list(tensor.shape)}, not of {num_experts} experts")
            elif expert is not None and expert >= num_experts:
                problems.append(f"{name} is of expert {expert}, there are {num_experts}")
        problems += _row_problems(layer, experts, stored, keys, own or [_some_expert(experts)])
    of_scales = ((name, tensor.problem) for name, tensor in stored.items() if not tensor.is_plain)
    problems += [f"{name} {problem}" for name, problem in of_scales if problem]
    problems = list(dict.fromkeys(problems))
    if problems:
        raise CheckpointError(f"the state dict does not fit: {in_short(problems)}")
    return layers


def _parameters(names: Iterable[str]) -> list[str]:
    """The experts' parameters that tensors of these names make up: biases are not in all families."""
    biased = any("bias" in name.rpartition(".")[2] for name in names)
    return [parameter for parameter in ExpertParams._fields if biased or not parameter.endswith("bias")]


def _row_problems(
    layer: str, experts: Mapping[str, int | None], stored: Mapping[str, Stored], keys: HFKeys, own: Iterable[int]
) -> list[str]:
    """What keeps the tensors of a layer's `own` experts from being rows of parameters, `[H, 2I]` and `[I, H]`."""
    problems: list[str] = []
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for parameter in _parameters(experts):
        for expert in own:
            parts = keys.parts(f"{layer}.{parameter}", expert, (0, 0))
            for part in parts:
                dims = (1 if "bias" in parameter else 2) + (part.expert is not None)
                if part.name not in stored:
                    problems.append(f"{part.name} is missing")
                elif len(stored[part.name].shape) != dims:
                    shape = list(stored[part.name].shape)
                    problems.append(f"{part.name} has shape {shape}, not one of {dims} dimensions")
            if not problems:
                shapes.setdefault(parameter, set()).update(_part_shapes(stored, parts))
                shapes.setdefault(f"{parameter} whole", set()).add(_row_shape(stored, parts))
    if problems:
        return problems
    if different := [sorted(each) for each in shapes.values() if len(each) > 1]:
        return [f"the experts of {layer} differ in shape: {different[0]}"]
    (first,), (second,) = shapes["gate_and_up_projs whole"], shapes["down_projs whole"]
    if first[0] != second[1] or first[1] not in (second[0], 2 * second[0]):
        return [f"the experts of {layer} have matrices {list(first)} and {list(second)}, which do not go together"]
    return [
        f"the experts of {layer} have matrices {list(matrix)} and {bias} {list(shape)}, which do not go together"
        for matrix, bias in ((first, "gate_and_up_bias"), (second, "down_bias"))
        for shape in shapes.get(f"{bias} whole", ())
        if shape != matrix[1:]
    ]


def _some_expert(experts: Mapping[str, int | None]) -> int:
    """One of which there are tensors."""
    return next(iter(experts.values())) or 0


def _part_shapes(stored: Mapping[str, Stored], parts: Sequence[Part]) -> list[tuple[int, ...]]:
    """What each of `parts` is of an expert's row of a parameter."""
    shapes = [stored[part.name].shape[part.expert is not None :] for part in parts]
    return [shape[::-1] if part.transposed else shape for part, shape in zip(parts, shapes, strict=True)]


def _row_shape(stored: Mapping[str, Stored], parts: Sequence[Part]) -> tuple[int, ...]:
    """Of an expert's row of a parameter, made of `parts`."""
    shapes = _part_shapes(stored, parts)
    return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


def _row(values: Mapping[str, Tensor], parts: Sequence[Part]) -> Tensor:
    """An expert's row of a parameter."""
    pieces = []
    for part in parts:
        value = values[part.name] if part.expert is None else values[part.name][part.expert]
        value = value.t() if part.transposed else value
        pieces.append(halves_apart(value) if part.interleaved else value)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _placement(
    name: str, tensor: Tensor, num_experts: int, placements: Mapping[str, ExpertPlacement]
) -> ExpertPlacement:
    """Where the experts of a parameter are. Raises CheckpointError for another number of them."""
    layer = plain_name(name).rpartition(".experts.")[0]
    placement = placements.get(layer) or ExpertPlacement.contiguous(num_experts, _ep_of(tensor)[0])
    if placement.num_rows != len(tensor):
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}: not {placement.num_rows} rows, as {num_experts} experts have"
        )
    return placement


def _distributed(stacked: Tensor, mesh: DeviceMesh | Meshes) -> DTensor:
    """The rows of this rank `[P/R, ...]` as its part of an expert parameter on `mesh`."""
    mesh = mesh.experts["ep_shard", "ep"] if isinstance(mesh, Meshes) else mesh
    names = mesh.mesh_dim_names or ("ep",)
    placements: list[Placement] = [Shard(0)]
    if len(names) > 1:
        of_name: dict[str, Placement] = {"ep": Shard(0), "ep_shard": Shard(1)}
        placements = [of_name.get(name, Replicate()) for name in names]
    sharding, size = mesh["ep_shard"] if "ep_shard" in names else None, stacked.shape
    shape = torch.Size((size[0] * _ep_mesh(mesh).size(), *size[1:]))
    if sharding is not None:
        if size[1] % sharding.size():
            raise CheckpointError(
                f"dimension 1 of experts {list(size)} must be divisible by ep_shard, {sharding.size()}"
            )
        stacked = stacked.chunk(sharding.size(), dim=1)[sharding.get_local_rank()].contiguous()
    return as_shard(stacked, mesh, tuple(placements), shape)


def _own_slots(num_experts: int, mesh: DeviceMesh | Meshes | None) -> tuple[int, ...]:
    if mesh is None:
        return tuple(range(num_experts))
    ep = _ep_mesh(mesh)
    return ExpertPlacement.contiguous(num_experts, ep.size()).experts_on(ep.get_local_rank())


def _ep_mesh(mesh: DeviceMesh | Meshes) -> DeviceMesh:
    if isinstance(mesh, Meshes):
        return mesh["ep"]
    if mesh.ndim > 1 and "ep" not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"the mesh must have a dimension ep, not {mesh.mesh_dim_names}; see ParallelDims")
    return mesh["ep"] if mesh.ndim > 1 else mesh


def _ep_of(tensor: Tensor) -> tuple[int, int]:
    """How many ranks an expert parameter is spread over, and which of them this is."""
    if not isinstance(tensor, DTensor) or Shard(0) not in tensor.placements:
        return 1, 0
    dim = tensor.placements.index(Shard(0))
    return tensor.device_mesh.size(dim), tensor.device_mesh.get_local_rank(dim)
