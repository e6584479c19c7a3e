"""Weights in Hugging Face's format: what a family's files hold, and reading them, each rank its own slices.

A checkpoint is a folder with `*.safetensors` and, where there are several, `model.safetensors.index.json`. Only headers
are read before it is known that all tensors are there and fit the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from crossdock.checkpoint.experts import ExpertRows
from crossdock.checkpoint.finite import what_is_not_finite
from crossdock.checkpoint.folders import CheckpointError, in_short
from crossdock.checkpoint.hf_files import OpenFiles, read_headers
from crossdock.checkpoint.stored import Stored, block_size, stored_tensors
from crossdock.comm import raise_together
from crossdock.experts import halves_apart, halves_interleaved
from crossdock.lora import base_of
from crossdock.moe import moe_layers
from crossdock.parallel import local_part, local_with_offsets, plain_name
from crossdock.placement import EMPTY

__all__ = ["HFCheckpoint", "HFKeys", "Part", "read_part", "tensor_shapes", "views_of"]


# Names of packed experts, by ours.
_PACKED = {
    "gate_and_up_projs": "gate_up_proj",
    "down_projs": "down_proj",
    "gate_and_up_bias": "gate_up_proj_bias",
    "down_bias": "down_proj_bias",
}


class Part(NamedTuple):
    """A tensor of a checkpoint and where it goes.

    Attributes:
        name: of the tensor.
        columns: of a parameter (or expert) that it makes up; `None` for all.
        transposed: whether it lies the other way round there.
        expert: which of its rows is meant, where it has a row for each expert.
        interleaved: whether its columns are gate and up in turn.
    """

    name: str
    columns: slice | None = None
    transposed: bool = False
    expert: int | None = None
    interleaved: bool = False

    def taken_from(self, values: Tensor) -> Tensor:
        """What the tensor holds of a parameter, or of one expert's matrix or several `[..., A, B]`."""
        values = values if self.columns is None else values[..., self.columns]
        values = halves_interleaved(values) if self.interleaved else values
        return values.mT if self.transposed else values

    def shape_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """That of `taken_from`, for a parameter, or one expert's matrix, of `shape`."""
        whole = tuple(shape) if self.columns is None else (shape[0], self.columns.stop - self.columns.start)
        return whole[::-1] if self.transposed else whole


@dataclass(frozen=True)
class HFKeys:
    """How a family's checkpoints name what its model holds (docs/semantics.md, "Checkpoints on disk").

    Attributes:
        renamed: pairs (part of a parameter's name here, there).
        gate, up, down: names of an expert's three matrices, after the name of the module that holds the experts; `{}`
            stands for the logical expert. They are `[I, H]`, `[I, H]` and `[H, I]`.
        packed: whether all experts are in one tensor instead: `gate_up_proj [E, H, 2I]` and `down_proj [E, I, H]`, and
            `{...}_bias` where there are biases.
        interleaved: whether a packed tensor's gate and up columns take turns.
        expert_bias: whether the router's expert bias is among the tensors.
        buffers: whether all persistent buffers of the model are.
        ignored: regular expressions of names that a checkpoint may hold and nobody needs.
    """

    renamed: Sequence[tuple[str, str]] = ()
    gate: str = "{}.gate_proj.weight"
    up: str = "{}.up_proj.weight"
    down: str = "{}.down_proj.weight"
    packed: bool = False
    interleaved: bool = False
    expert_bias: bool = False
    buffers: bool = False
    ignored: Sequence[str] = (r"rotary_emb\.inv_freq$",)

    def parts(self, name: str, expert: int | None, shape: Sequence[int]) -> list[Part]:
        """The tensors that make up a parameter, or the matrix `[A, B]` that an `expert` has in it.

        Args:
            name: of the parameter.
            expert: the logical expert; `None` for a parameter that is no expert's.
            shape: of the parameter or matrix.
        """
        if expert is None:
            return [Part(self.theirs(name))]
        module, _, parameter = name.rpartition(".")
        module = self.theirs(f"{module}.")
        if self.packed:
            interleaved = self.interleaved and parameter.startswith("gate_and_up")
            return [Part(module + _PACKED[parameter], expert=expert, interleaved=interleaved)]
        if parameter == "down_projs":
            return [Part(module + self.down.format(expert), transposed=True)]
        size = shape[1] // 2
        return [
            Part(module + self.gate.format(expert), slice(0, size), transposed=True),
            Part(module + self.up.format(expert), slice(size, 2 * size), transposed=True),
        ]

    def theirs(self, name: str) -> str:
        """A name of ours, or the beginning of one, in a checkpoint."""
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name

    def ours(self, name: str) -> str:
        """A name of a checkpoint, or the beginning of one, in our model."""
        for ours, theirs in reversed(self.renamed):
            name = name.replace(theirs, ours)
        return name

    def place_of(self, name: str) -> tuple[str, int | None] | None:
        """Our name of the module of experts that a checkpoint's tensor belongs to, and which expert's it is.

        That is `None` where it is of all of them; the whole is where the tensor is no expert's.
        """
        ends = map(re.escape, _PACKED.values() if self.packed else (self.gate, self.up, self.down))
        ends = (end.replace(re.escape("{}"), r"(?P<expert>\d+)", 1) for end in ends)
        for end in ends:
            if (match := re.fullmatch(rf"(?P<module>.+)\.{end}", name)) is not None:
                module = self.ours(f"{match['module']}.").removesuffix(".")
                if module.endswith("experts"):
                    return module, None if self.packed else int(match["expert"])
        return None


@dataclass(frozen=True)
class HFCheckpoint:
    """The weights in a folder of Hugging Face's format; made by `open`, which reads headers alone.

    Attributes:
        folder: holds the files.
        tensors: by name.
    """

    folder: Path
    tensors: Mapping[str, Stored] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> HFCheckpoint:
        """Read the headers.

        Raises:
            CheckpointError: for a folder without safetensors, a file that is missing, cut off or none, and a tensor
                that is in two files or not where the index says.
        """
        return cls(folder, stored_tensors(read_headers(folder), block_size(folder)))

    def check(self, model: nn.Module, keys: HFKeys) -> None:
        """Compare names, shapes and dtypes with what `model` holds; it may be on the meta device, on any layout.

        Raises:
            CheckpointError: naming the tensors that are missing, unexpected, misshapen or of a dtype that is not read.
        """
        wanted = tensor_shapes(model, keys)
        problems = [f"{name} is missing" for name in sorted(wanted.keys() - self.tensors.keys())]
        for name in sorted(wanted.keys() & self.tensors.keys()):
            stored = self.tensors[name]
            if stored.problem:
                problems.append(f"{name} {stored.problem}")
            elif stored.shape != wanted[name]:
                problems.append(f"{name} has shape {list(stored.shape)}, the model needs {list(wanted[name])}")
        tied = {keys.parts(name, None, ())[0].name for name in _second_names(model)}
        for name in sorted(self.tensors.keys() - wanted.keys() - tied):
            if not any(re.search(pattern, name) for pattern in keys.ignored):
                problems.append(f"{name} is unexpected: the model has no such weight")
        if problems:
            raise CheckpointError(f"weights in {self.folder} do not fit the model: {in_short(problems)}")

    @torch.no_grad()
    def load(self, model: nn.Module, keys: HFKeys) -> None:
        """Fill all parameters in place; each rank reads the slices that it owns, and no others. After `check`.

        Slots without an expert become 0. A dtype that differs is converted. Collective where there are ranks.

        Raises:
            CheckpointError: on all ranks, if a file could not be read on one, or holds NaN or infinity.
        """
        error: Exception | None = None
        problems: list[str] = []
        buffers = {plain_name(name) for name, _ in model.named_buffers()}
        try:
            with OpenFiles(self.folder) as files:
                for name, expert, view in views_of(model, keys):
                    local, offsets = local_with_offsets(view)
                    for part in keys.parts(name, expert, view.shape):
                        values = read_part(files, self.tensors[part.name], part, local, offsets)
                        what = what_is_not_finite(values, may_be_infinite=name in buffers)
                        problems += [f"{part.name} {what}"] if what else []
        except (OSError, RuntimeError, SafetensorError) as caught:  # torch raises RuntimeError where mmap fails.
            error = CheckpointError(f"cannot read the weights in {self.folder}: {caught}")
        if problems and error is None:
            error = CheckpointError(f"the weights in {self.folder} are damaged: {in_short(problems)}")
        raise_together(error)
        _clear_empty_slots(model)
        for layer in moe_layers(model).values():
            layer.weights_changed()


def views_of(model: nn.Module, keys: HFKeys) -> Iterator[tuple[str, int | None, Tensor]]:
    """Name, expert and value of every parameter, of experts row by row: views of what this rank has, or DTensors.

    Adapters (`crossdock.lora`) are left out. Expert biases and buffers come last, where `keys` has them.
    """
    rows = ExpertRows(model)
    for name, parameter in base_of(model).items():
        is_expert = rows.is_expert(parameter)
        for row, view in rows.split(name, parameter, parameter.detach()).items():
            yield (*_split_row(row, is_expert), view)
    yield from ((name, None, buffer) for name, buffer in _stored_buffers(model, keys))


def _stored_buffers(model: nn.Module, keys: HFKeys) -> Iterator[tuple[str, Tensor]]:
    if keys.buffers:
        persistent = model.state_dict().keys()
        named = model.named_buffers()
        yield from ((plain_name(name), buffer) for name, buffer in named if plain_name(name) in persistent)
    for name, layer in moe_layers(model).items():
        if keys.expert_bias and layer.router is not None and layer.router.expert_bias is not None:
            yield plain_name(f"{name}.router.expert_bias"), layer.router.expert_bias


def tensor_shapes(model: nn.Module, keys: HFKeys) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint of `model` has; on any layout, or on the meta device."""
    rows = ExpertRows(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in base_of(model).items():
        is_expert = rows.is_expert(parameter)
        shape = tuple(parameter.shape[1:] if is_expert else parameter.shape)
        names = rows.all_names(name, parameter, parameter)
        for row in names:
            for part in keys.parts(*_split_row(row, is_expert), shape):
                whole = part.shape_of(shape)
                shapes[part.name] = whole if part.expert is None else (len(names), *whole)
    shapes |= {keys.parts(name, None, shape)[0].name: tuple(shape) for name, shape in rows.elsewhere.items()}
    for name, buffer in _stored_buffers(model, keys):
        shapes[keys.parts(name, None, ())[0].name] = tuple(buffer.shape)
    return shapes


def _split_row(name: str, is_expert: bool) -> tuple[str, int | None]:
    """The parameter and the expert that a name of `ExpertRows` stands for."""
    if not is_expert:
        return name, None
    parameter, expert = name.rsplit(".", 1)
    return parameter, int(expert)


def _second_names(model: nn.Module) -> set[str]:
    """The names of tied parameters that are not their first: some checkpoints hold the values twice."""
    every = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return {plain_name(name) for name in every} - {plain_name(name) for name, _ in model.named_parameters()}


def read_part(files: OpenFiles, stored: Stored, part: Part, local: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Copy what `local` covers of a stored tensor; `offsets` says where `local` starts in the parameter.

    Returns the view of `local` that it has filled.
    """
    ranges = [(start, start + size) for start, size in zip(offsets, local.shape, strict=True)]
    if part.columns is not None:
        first, last = max(ranges[1][0], part.columns.start), min(ranges[1][1], part.columns.stop)
        local = local[:, first - offsets[1] : last - offsets[1]]
        ranges[1] = (first - part.columns.start, last - part.columns.start)
    if local.numel() == 0:
        return local
    if part.expert is not None:
        *others, last = ranges
        dim = 1 if part.transposed else -1
        read = [*others, (0, stored.shape[dim]) if part.interleaved else last]
        read = read[::-1] if part.transposed else read
        values = stored.read(files, [(part.expert, part.expert + 1), *read])[0]
        values = values.t() if part.transposed else values
        if part.interleaved:
            values = halves_apart(values)[..., slice(*last)]
        return local.copy_(values)
    values = stored.read(files, ranges[::-1] if part.transposed else ranges)
    return local.copy_(values.t() if part.transposed else values)


def _clear_empty_slots(model: nn.Module) -> None:
    for layer in moe_layers(model).values():
        for parameter in layer.experts.slot_parameters().values():
            local = local_part(parameter.detach())
            for slot, expert in enumerate(layer.local_expert_ids):
                if expert == EMPTY:
                    local[slot].zero_()
