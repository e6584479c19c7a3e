"""Hugging Face's format: safetensors in, each rank its own slices; safetensors out, one tensor per expert.

A checkpoint is a folder with `*.safetensors` and, where there are several, `model.safetensors.index.json`. Only headers
are read before it is known that all tensors are there and fit the model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from crossdock.checkpoint.experts import ExpertRows
from crossdock.checkpoint.folders import CheckpointError
from crossdock.comm import raise_together
from crossdock.moe import moe_layers
from crossdock.parallel import plain_name
from crossdock.placement import EMPTY

__all__ = ["DTYPES", "HFCheckpoint", "HFKeys", "save_hf"]

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_FILE_BYTES = 2 * 2**30
# No header of a real checkpoint comes near; a file that is none may claim any size.
_MOST_HEADER_BYTES = 100 * 2**20
_SHOWN = 8

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The floating dtypes that can be read and written, by safetensors' names."""


class _Part(NamedTuple):
    """A tensor of a checkpoint and where it goes: these columns of a parameter (or expert), `None` for all."""

    name: str
    columns: slice | None
    transposed: bool


@dataclass(frozen=True)
class HFKeys:
    """How a family's checkpoints name what its model holds (SEMANTICS.md, "Checkpoints on disk").

    Attributes:
        renamed: pairs (part of a parameter's name here, there).
        gate, up, down: names of an expert's three matrices, after the name of the module that holds the experts; `{}`
            stands for the logical expert. They are `[I, H]`, `[I, H]` and `[H, I]`.
        ignored: regular expressions of names that a checkpoint may hold and nobody needs.
    """

    renamed: Sequence[tuple[str, str]] = ()
    gate: str = "{}.gate_proj.weight"
    up: str = "{}.up_proj.weight"
    down: str = "{}.down_proj.weight"
    ignored: Sequence[str] = (r"rotary_emb\.inv_freq$",)

    def parts(self, name: str, shape: Sequence[int]) -> list[_Part]:
        """The tensors that make up a parameter, or an expert's row of one (`name.e`, as `ExpertRows` has it)."""
        if not _is_expert(name):
            return [_Part(self._there(name), None, False)]
        row, expert = name.rsplit(".", 1)
        if row.endswith("down_projs"):
            return [_Part(self._there(row.removesuffix("down_projs")) + self.down.format(expert), None, True)]
        module, size = self._there(row.removesuffix("gate_and_up_projs")), shape[1] // 2
        return [
            _Part(module + self.gate.format(expert), slice(0, size), True),
            _Part(module + self.up.format(expert), slice(size, 2 * size), True),
        ]

    def _there(self, name: str) -> str:
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name


class _Stored(NamedTuple):
    """What a header says of a tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HFCheckpoint:
    """The weights in a folder of Hugging Face's format; made by `open`, which reads headers alone.

    Attributes:
        folder: holds the files.
        tensors: by name.
    """

    folder: Path
    tensors: Mapping[str, _Stored] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> HFCheckpoint:
        """Read the headers.

        Raises:
            CheckpointError: for a folder without safetensors, a file that is missing, cut off or none, and a tensor
                that is in two files or not where the index says.
        """
        index = _read_index(folder)
        files = sorted(set(index.values())) if index else [_SINGLE_FILE]
        tensors: dict[str, _Stored] = {}
        for file in files:
            for name, stored in _read_header(folder, file).items():
                if name in tensors:
                    raise CheckpointError(f"{folder}: {name} is in {tensors[name].file} and in {file}")
                tensors[name] = stored
        for name, file in index.items():
            if name not in tensors or tensors[name].file != file:
                raise CheckpointError(f"{folder}: {_INDEX_FILE} says that {name} is in {file}, where it is not")
        return cls(folder, tensors)

    def check(self, model: nn.Module, keys: HFKeys) -> None:
        """Compare names, shapes and dtypes with what `model` holds; it may be on the meta device, on any layout.

        Raises:
            CheckpointError: naming the tensors that are missing, unexpected, misshapen or of a dtype that is not read.
        """
        wanted = dict(_global_parts(model, keys))
        problems = [f"{name} is missing" for name in sorted(wanted.keys() - self.tensors.keys())]
        for name in sorted(wanted.keys() & self.tensors.keys()):
            stored = self.tensors[name]
            if stored.shape != wanted[name]:
                problems.append(f"{name} has shape {list(stored.shape)}, the model needs {list(wanted[name])}")
            elif stored.dtype not in DTYPES:
                problems.append(f"{name} is {stored.dtype}; {', '.join(DTYPES)} can be read")
        tied = {keys.parts(name, ())[0].name for name in _second_names(model)}
        for name in sorted(self.tensors.keys() - wanted.keys() - tied):
            if not any(re.search(pattern, name) for pattern in keys.ignored):
                problems.append(f"{name} is unexpected: the model has no such weight")
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(
                f"weights in {self.folder} do not fit the model: {'; '.join(problems[:_SHOWN])}{more}"
            )

    @torch.no_grad()
    def load(self, model: nn.Module, keys: HFKeys) -> None:
        """Fill all parameters in place; each rank reads the slices that it owns, and no others. After `check`.

        Slots without an expert become 0. A dtype that differs is converted. Collective where there are ranks.

        Raises:
            CheckpointError: on all ranks, if a file could not be read on one.
        """
        error: Exception | None = None
        try:
            with ExitStack() as stack:
                files: dict[str, Any] = {}
                for name, view in _views(model):
                    local, offsets = _local_with_offsets(view)
                    for part in keys.parts(name, view.shape):
                        file = self.tensors[part.name].file
                        if file not in files:
                            files[file] = stack.enter_context(safe_open(self.folder / file, framework="pt"))
                        _read_part(files[file].get_slice(part.name), part, local, offsets)
        except (OSError, RuntimeError, SafetensorError) as caught:  # torch raises RuntimeError where mmap fails.
            error = CheckpointError(f"cannot read the weights in {self.folder}: {caught}")
        raise_together(error)
        _clear_empty_slots(model)

    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor, by safetensors' names."""
        return {name: stored.dtype for name, stored in self.tensors.items()}


@torch.no_grad()
def save_hf(model: nn.Module, keys: HFKeys, folder: Path, dtypes: Mapping[str, str], default_dtype: str) -> None:
    """Write the weights of `model` into an existing folder, with an index. Collective; on any layout.

    The experts are written by the ranks that hold them (the first of those that share them), all else by the first
    rank, in files of some 2 GiB: no rank holds more than that beside its part of the model.

    Args:
        model: its weights.
        keys: of its family.
        folder: the same one for all ranks.
        dtypes: of tensors by name, for those that shall not have `default_dtype`.
        default_dtype: one of `DTYPES`.

    Raises:
        CheckpointError: on all ranks, if a file could not be written.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    groups = [layer.ep_group for layer in moe_layers(model).values() if layer.ep_group is not None]
    writes_experts = 0 in dist.get_process_group_ranks(groups[0]) if groups else rank == 0
    writer = _Writer(folder, f"part-{rank:05d}")
    error: Exception | None = None
    # First of all, since it makes FSDP shard again what a forward pass has left gathered.
    model.state_dict()
    for name, view in _views(model):
        # Collective: it goes on after an error, since other ranks wait for this one's part.
        whole = view.full_tensor() if isinstance(view, DTensor) else view
        if error is not None or not (writes_experts if _is_expert(name) else rank == 0):
            continue
        try:
            for part in keys.parts(name, view.shape):
                piece = whole if part.columns is None else whole[:, part.columns]
                dtype = DTYPES[dtypes.get(part.name, default_dtype)]
                writer.add(part.name, (piece.t() if part.transposed else piece).to("cpu", dtype))
        except (OSError, SafetensorError) as caught:
            error = caught
    try:
        writer.flush()
    except (OSError, SafetensorError) as caught:
        error = error or caught
    raise_together(error and CheckpointError(f"cannot write the weights below {folder}: {error}"))
    written = [writer]
    if dist.is_initialized():
        written = [writer] * dist.get_world_size()
        dist.all_gather_object(written, writer)
    error = None
    if rank == 0:
        try:
            _finish(folder, written)
        except OSError as caught:
            error = CheckpointError(f"cannot write the weights below {folder}: {caught}")
    raise_together(error)


class _Writer:
    """One rank's files: tensors are collected, and written when there are enough of them."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.names_of_file: dict[str, list[str]] = {}
        self.total_bytes = 0
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        # A copy of its own: the whole of which this is a part must not stay, and a view is no tensor of a file.
        self._tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._num_bytes += tensor.nbytes
        if self._num_bytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._tensors:
            return
        file = f"{self.prefix}-{len(self.names_of_file):05d}.safetensors"
        save_file(self._tensors, self.folder / file, metadata={"format": "pt"})
        self.names_of_file[file] = list(self._tensors)
        self.total_bytes += self._num_bytes
        self._tensors, self._num_bytes = {}, 0


def _finish(folder: Path, written: list[_Writer]) -> None:
    """Give the files of all ranks their final names, and write the index where there are several."""
    names_of_file = {file: names for writer in written for file, names in writer.names_of_file.items()}
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(sorted(names_of_file.items()), start=1):
        final = f"model-{number:05d}-of-{len(names_of_file):05d}.safetensors"
        if len(names_of_file) == 1:
            final = _SINGLE_FILE
        (folder / file).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(names_of_file) > 1:
        metadata = {"total_size": sum(writer.total_bytes for writer in written)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _is_expert(name: str) -> bool:
    """Whether `name` is an expert's row of a parameter: `ExpertRows` ends such names with the expert."""
    return re.search(r"\.(gate_and_up|down)_projs\.\d+$", name) is not None


def _views(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, an expert's row by row: views of what this rank has, whole or as DTensors."""
    rows = ExpertRows(model)
    for name, parameter in model.named_parameters():
        yield from rows.split(name, parameter, parameter.detach()).items()


def _global_parts(model: nn.Module, keys: HFKeys) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a checkpoint of this model has."""
    rows = ExpertRows(model)
    for name, parameter in model.named_parameters():
        for row in rows.all_names(name, parameter, parameter):
            shape = tuple(parameter.shape[1:] if _is_expert(row) else parameter.shape)
            for part in keys.parts(row, shape):
                whole = shape if part.columns is None else (shape[0], part.columns.stop - part.columns.start)
                yield part.name, whole[::-1] if part.transposed else whole


def _second_names(model: nn.Module) -> set[str]:
    """The names of tied parameters that are not their first: some checkpoints hold the values twice."""
    every = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return {plain_name(name) for name in every} - {plain_name(name) for name, _ in model.named_parameters()}


def _local_with_offsets(view: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a view, and where it starts in the whole."""
    if not isinstance(view, DTensor):
        return view, (0,) * view.ndim
    _, offsets = compute_local_shape_and_global_offset(view.shape, view.device_mesh, view.placements)
    return view.to_local(), tuple(offsets)


def _read_part(stored: Any, part: _Part, local: Tensor, offsets: tuple[int, ...]) -> None:
    """Copy what `local` covers of a stored tensor; `offsets` says where `local` starts in the parameter."""
    ranges = [(start, start + size) for start, size in zip(offsets, local.shape, strict=True)]
    if part.columns is not None:
        first, last = max(ranges[1][0], part.columns.start), min(ranges[1][1], part.columns.stop)
        local = local[:, first - offsets[1] : last - offsets[1]]
        ranges[1] = (first - part.columns.start, last - part.columns.start)
    if local.numel() == 0:
        return
    values = stored[tuple(slice(*bounds) for bounds in (reversed(ranges) if part.transposed else ranges))]
    local.copy_(values.t() if part.transposed else values)


def _clear_empty_slots(model: nn.Module) -> None:
    for layer in moe_layers(model).values():
        for parameter in layer.experts.parameters():
            local = parameter.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            for slot, expert in enumerate(layer.local_expert_ids):
                if expert == EMPTY:
                    local[slot].zero_()


def _read_index(folder: Path) -> dict[str, str]:
    """The file of every tensor, empty where there is one file and no index."""
    path = folder / _INDEX_FILE
    if not path.is_file():
        if not (folder / _SINGLE_FILE).is_file():
            raise CheckpointError(f"{folder} holds no weights: neither {_INDEX_FILE} nor {_SINGLE_FILE}")
        return {}
    try:
        index = json.loads(path.read_text())["weight_map"]
        named = all(isinstance(file, str) and Path(file).name == file for file in index.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): it must hold a weight_map of names to files") from None
    if not index or not named:
        raise CheckpointError(f"{path} must hold a weight_map of names to files in the same folder")
    return index


def _read_header(folder: Path, file: str) -> dict[str, _Stored]:
    """What a safetensors file says that it holds, and that it is long enough to hold it."""
    path = folder / file
    try:
        with open(path, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if 0 < length <= _MOST_HEADER_BYTES else None
        if not isinstance(header, dict):
            raise CheckpointError(f"{path} is no safetensors file")
        header.pop("__metadata__", None)
        held = path.stat().st_size - 8 - length
        stored = {name: _Stored(file, about["dtype"], tuple(about["shape"])) for name, about in header.items()}
        cut = [name for name, about in header.items() if about["data_offsets"][1] > held]
        short = [name for name, about in header.items() if not _fills(about)]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or is cut off ({error})") from None
    if cut:
        more = f" and {len(cut) - _SHOWN} more" if len(cut) > _SHOWN else ""
        raise CheckpointError(f"{path} is cut off: {', '.join(cut[:_SHOWN])}{more} reach beyond its end")
    if short:
        raise CheckpointError(
            f"{path} is damaged: its header gives {', '.join(short[:_SHOWN])} another size than shape"
        )
    try:
        # What else safetensors objects to, tensors that overlap for instance. For torch it would map the file as memory
        # that could be written, which fails for files larger than the machine's.
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or is damaged ({error})") from None
    return stored


def _fills(about: Mapping[str, Any]) -> bool:
    """Whether a header's entry gives a tensor as many bytes as its shape needs; true for dtypes that are not read."""
    dtype = DTYPES.get(about["dtype"])
    first, end = about["data_offsets"]
    return dtype is None or end - first == math.prod(about["shape"]) * dtype.itemsize
