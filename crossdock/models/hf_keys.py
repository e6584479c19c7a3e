"""What a family's files call their tensors, found by sending numbered tensors through transformers' own conversion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from crossdock.checkpoint import CheckpointError, HFKeys, Part
from crossdock.experts import ExpertParams
from crossdock.models.hf_experts import experts_params, is_experts

__all__ = ["converted_keys"]

# Sizes of the stand-ins for matrices; what is halved, is even.
_ROWS, _COLUMNS = 4, 3
_STEP = 2**20


class _Place(NamedTuple):
    """A tensor that holds an expert's matrix, or one half of its columns."""

    name: str
    half: int | None
    transposed: bool
    interleaved: bool
    packed: bool


@dataclass(frozen=True)
class _ConvertedKeys(HFKeys):
    """Names that were looked up one by one.

    Attributes:
        dense: names there, by ours.
        places: of each expert's matrix, by parameter here and expert.
    """

    dense: Mapping[str, str] = field(default_factory=dict, repr=False)
    places: Mapping[tuple[str, int], Sequence[_Place]] = field(default_factory=dict, repr=False)

    def parts(self, name: str, expert: int | None, shape: Sequence[int]) -> list[Part]:
        if expert is None:
            return [Part(self.dense[name])]
        if (name, expert) not in self.places:
            raise CheckpointError(f"the model that these keys are of has no expert {expert} in {name}")
        parts = []
        for place in self.places[name, expert]:
            columns = None
            if place.half is not None:
                size = shape[-1] // 2
                columns = slice(place.half * size, (place.half + 1) * size)
            packed = expert if place.packed else None
            parts.append(Part(place.name, columns, place.transposed, packed, place.interleaved))
        return parts

    def theirs(self, name: str) -> str:
        return self.dense.get(name, name)

    def ours(self, name: str) -> str:
        return self._ours.get(name, name)

    def place_of(self, name: str) -> tuple[str, int | None] | None:
        return self._of_experts.get(name)

    @cached_property
    def _ours(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.dense.items()}

    @cached_property
    def _of_experts(self) -> dict[str, tuple[str, int | None]]:
        return {
            place.name: (parameter.rpartition(".")[0], None if place.packed else expert)
            for (parameter, expert), places in self.places.items()
            for place in places
        }


def converted_keys(model: PreTrainedModel) -> HFKeys:
    """The keys of a family's checkpoints, for the model that `replace_experts` makes of `model`.

    transformers converts between the names and shapes of files and those of its model. What it would save is looked up
    here for stand-ins, small tensors of distinct numbers, so that each number tells where it comes from.

    Args:
        model: transformers' own, on the meta device.

    Raises:
        CheckpointError: where files hold something else than tensors as they are, one expert's matrices, or all experts
            packed.
    """
    from transformers.core_model_loading import revert_weight_conversion

    modules = {name: module for name, module in model.named_modules() if is_experts(module)}
    stand_ins = _stand_ins(model, modules)
    try:
        stored = revert_weight_conversion(model, dict(stand_ins))
    except Exception as error:  # noqa: BLE001 - whatever an operation raises that needs the real sizes.
        raise _refusal(model, f"a conversion that does more than rename, split and stack ({error})") from None
    owners = {number: name for name, tensor in stored.items() for number in tensor.flatten().tolist()}
    dense: dict[str, str] = {}
    of_experts = {f"{prefix}.{name}" for prefix, module in modules.items() for name, _ in module.named_parameters()}
    for index, (name, tensor) in enumerate(stand_ins.items()):
        if name in of_experts:
            continue
        file = owners.get(float(index * _STEP))
        if file is None or not torch.equal(stored[file], tensor):
            raise _refusal(model, f"another tensor than {name}, or a part of it")
        dense[name] = file
    places: dict[tuple[str, int], Sequence[_Place]] = {}
    for prefix, module in modules.items():
        ours = _as_ours(module, {name: stand_ins[f"{prefix}.{name}"] for name, _ in module.named_parameters()})
        for name, param in ((name, param) for name, param in ours._asdict().items() if param is not None):
            for expert, matrix in enumerate(param):
                found = _places(matrix, param, stored, owners)
                # Halves of a vector would have to be read in parts.
                if not found or (matrix.ndim == 1 and len(found) > 1) or sum(p.half is not None for p in found) == 1:
                    raise _refusal(model, f"experts in a way of their own (those of {prefix})")
                places[f"{prefix}.experts.{name}", expert] = found
    packed = {place.packed for each in places.values() for place in each}
    if len(packed) > 1:
        raise _refusal(model, "some of an expert's matrices packed and some apart")
    ignored = (*HFKeys.ignored, *(model._keys_to_ignore_on_load_unexpected or ()))
    return _ConvertedKeys(packed=packed == {True}, buffers=True, ignored=ignored, dense=dense, places=places)


def _stand_ins(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """A small tensor for each of the model's, with as many experts; the n-th has numbers from `n * _STEP`."""
    stand_ins = {}
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if not tensor.is_floating_point():
            raise _refusal(model, f"integers ({name})")
        prefix, _, parameter = name.rpartition(".")
        shape: tuple[int, ...] = (_ROWS, _COLUMNS, 2, 2, 2)[: tensor.ndim]
        if prefix in modules:
            shape = _expert_shape(modules[prefix], parameter, len(tensor))
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
        stand_ins[name] = (numbers + index * _STEP).view(shape)
    return stand_ins


def _expert_shape(module: Any, name: str, num_experts: int) -> tuple[int, ...]:
    """Of the stand-in of an expert's parameter: `H` is 3; `I` is 2, or 4 without a gate."""
    is_down = name.startswith("down")
    inner = 2 if is_down and module.has_gate else _ROWS
    outputs, inputs = (_COLUMNS, inner) if is_down else (inner, _COLUMNS)
    if name.endswith("_bias"):
        return num_experts, outputs
    return (num_experts, inputs, outputs) if module.is_transposed else (num_experts, outputs, inputs)


def _as_ours(module: Any, tensors: Mapping[str, Tensor]) -> ExpertParams:
    layout = {name: getattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")}
    return experts_params(SimpleNamespace(**layout, **tensors))  # type: ignore[arg-type]


def _places(matrix: Tensor, param: Tensor, stored: Mapping[str, Tensor], owners: Mapping[float, str]) -> list[_Place]:
    """Where files hold an expert's `matrix` of `param` (`[E, A, B]` or `[E, A]`); none for a way that is not known."""
    first, last = (owners.get(number.item()) for number in (matrix.flatten()[0], matrix.flatten()[-1]))
    if first is None or last is None:
        return []
    if first != last:
        halves = zip((first, last), matrix.tensor_split(2, dim=-1), strict=True)
        found = [(_orientation(stored[name], columns), name, half) for half, (name, columns) in enumerate(halves)]
        return [_Place(name, half, turned, False, False) for turned, name, half in found if turned is not None]
    interleaved = torch.stack(param.tensor_split(2, dim=-1), dim=-1).flatten(-2) if param.shape[-1] % 2 == 0 else param
    for whole, packed, in_turn in ((matrix, False, False), (param, True, False), (interleaved, True, True)):
        turned = _orientation(stored[first], whole)
        if turned is not None:
            return [_Place(first, None, turned, in_turn, packed)]
    return []


def _orientation(stored: Tensor, ours: Tensor) -> bool | None:
    """Whether a stored tensor is ours the other way round; `None` where it is another one."""
    if torch.equal(stored, ours):
        return False
    return True if ours.ndim > 1 and torch.equal(stored, ours.mT) else None


def _refusal(model: PreTrainedModel, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoints of {model.config.model_type} hold {what}; model.name = generic reads and writes tensors "
        "as they are, and experts apart or packed"
    )
