"""Tensors of a folder of torch's distributed checkpoint, one at a time, as tensors of Hugging Face's format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from crossdock.checkpoint.folders import CheckpointError
from crossdock.checkpoint.hf import HFCheckpoint, HFKeys, Part, views_of
from crossdock.checkpoint.hf_files import DTYPES
from crossdock.checkpoint.stored import Reader, Stored

__all__ = ["Convention", "DCPTensors", "Located", "Place", "checkpoint_as_hf", "locate", "our_rows"]


class Place(NamedTuple):
    """Where a folder has a tensor of Hugging Face's format, or what one expert has in it.

    Attributes:
        name: of the folder's tensor.
        expert: which of its rows is meant, where it has a row for each expert.
        rows: those of the expert's matrix (or of the tensor) that are meant; `None` for all.
        as_ours: whether it lies as our parameters do, else as Hugging Face's.
    """

    name: str
    expert: int | None = None
    rows: slice | None = None
    as_ours: bool = False


class Located(NamedTuple):
    """A tensor of Hugging Face's format in a folder.

    Attributes:
        places: where each part of it is: one, or one per expert where all experts are packed in the tensor.
        num_experts: of its layer; 0 for what is no expert's.
    """

    places: list[tuple[Part, Place]]
    num_experts: int


Convention = Callable[[str, int | None, Part], Place]
"""How a folder names things: (our parameter, expert or None, part of a tensor of Hugging Face's) to its place."""


def our_rows(name: str, expert: int | None, part: Part) -> Place:
    """As our own checkpoints: each expert's row by itself."""
    return Place(name if expert is None else f"{name}.{expert}", as_ours=True)


def locate(model: nn.Module, keys: HFKeys, convention: Convention) -> dict[str, Located]:
    """Where a folder has every tensor of Hugging Face's format that `model` needs; by its name.

    Args:
        model: on one rank, on the meta device too.
        keys: of its family.
        convention: the folder's.
    """
    held = [(name, expert, tuple(view.shape)) for name, expert, view in views_of(model, keys)]
    experts = Counter(name for name, expert, _ in held if expert is not None)
    located: dict[str, Located] = {}
    for name, expert, shape in held:
        for part in keys.parts(name, expert, shape):
            entry = located.setdefault(part.name, Located([], experts[name]))
            entry.places.append((part, convention(name, expert, part)))
    return located


class DCPTensors:
    """The tensors of a folder.

    Args:
        folder: for messages.
        reader: of the folder.

    Attributes:
        sizes: what there is, by name, without reading it.
    """

    def __init__(self, folder: Path, reader: FileSystemReader) -> None:
        self.folder = folder
        self._reader = reader
        self._metadata = reader.read_metadata()
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        stored = self._metadata.state_dict_metadata
        self.sizes = {name: about for name, about in stored.items() if isinstance(about, TensorStorageMetadata)}

    def read(self, name: str) -> Tensor:
        """The whole tensor. Raises CheckpointError."""
        about = self.sizes[name]
        tensor = torch.empty(about.size, dtype=about.properties.dtype)
        planner = DefaultLoadPlanner()
        try:
            planner.set_up_planner({name: tensor}, self._metadata, is_coordinator=True)
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # Whatever is wrong with a file, torch asserts something.
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if isinstance(error, UnpicklingError):  # torch's message says how to run it.
                reason = "its file holds something else than a tensor, which could run code and is refused"
            raise CheckpointError(f"cannot read {name} in {self.folder}: {reason}") from error
        return tensor

    def as_hf(self, located: Mapping[str, Located]) -> HFCheckpoint:
        """The folder as one of Hugging Face's format; `HFCheckpoint.check` tells whether it is whole.

        Args:
            located: names of Hugging Face's format, and where they are; those that are not in the folder are left out.
        """
        there = {
            name: entry for name, entry in located.items() if all(place.name in self.sizes for _, place in entry.places)
        }
        uses = Counter(place.name for entry in there.values() for _, place in entry.places)
        recent = _Recent(self, uses)
        tensors: dict[str, Stored] = {name: _InFolder(recent, entry) for name, entry in there.items()}
        return HFCheckpoint(self.folder, tensors)


class _Recent:
    """Reads tensors, and keeps one that others are still to be made of until two more such have been read."""

    def __init__(self, tensors: DCPTensors, uses: Mapping[str, int]) -> None:
        self.tensors = tensors
        self._uses = dict(uses)
        self._kept: dict[str, Tensor] = {}

    def read(self, name: str, uses: int = 1) -> Tensor:
        """The tensor, for as many `uses` of it."""
        tensor = self._kept.pop(name, None)
        if tensor is None:
            while len(self._kept) > 1:  # Gate and up may be two tensors, which are needed in turn.
                del self._kept[next(iter(self._kept))]
            tensor = self.tensors.read(name)
        self._uses[name] -= uses
        if self._uses[name] > 0:
            self._kept[name] = tensor
        return tensor


class _InFolder(Stored):
    """A tensor of Hugging Face's format, made of a folder's."""

    def __init__(self, source: _Recent, located: Located) -> None:
        self._source = source
        self._located = located
        self._packed = located.places[0][0].expert is not None
        places = [place for _, place in located.places]
        abouts = [source.tensors.sizes[place.name] for place in places]
        dtypes = {about.properties.dtype for about in abouts}
        self.dtype = _name_of(abouts[0].properties.dtype)
        self.shape = ()
        if len(dtypes) > 1 or self.dtype not in DTYPES:
            self.problem = f"is {' and '.join(sorted(map(str, dtypes)))}; one of {', '.join(DTYPES)} can be read"
            return
        for place, about in zip(places, abouts, strict=True):
            if (size := sum(math.prod(chunk.sizes) for chunk in about.chunks)) != math.prod(about.size):
                self.problem = f"is not whole: the pieces of {place.name} hold {size} of {math.prod(about.size)} values"
            elif place.expert is not None and about.size[:1] != (located.num_experts,):
                shape = f"shape {list(about.size)}, not a row for each of {located.num_experts} experts"
                self.problem = f"is in {place.name}, which has {shape}"
        if not self.problem:
            self._find_shape()

    def _find_shape(self) -> None:
        sizes = self._source.tensors.sizes
        try:
            made = self._made(
                lambda name, _=1: torch.empty(sizes[name].size, device="meta"), 0, len(self._located.places)
            )
            self.shape = tuple(made.shape)
        except (IndexError, RuntimeError):  # Fewer dimensions than it should have, or ragged rows.
            (_, place), *_ = self._located.places
            self.problem = f"cannot be made of {place.name}, which has shape {list(sizes[place.name].size)}"

    def read(self, files: Reader, bounds: Sequence[tuple[int, int]]) -> Tensor:
        if not self._packed:
            return self._made(self._source.read, 0, 1)[tuple(slice(*ends) for ends in bounds)]
        (first, last), *others = bounds
        packed = self._made(self._source.read, first, last)
        return packed[(slice(None), *(slice(*ends) for ends in others))]

    def _made(self, read: Callable[..., Tensor], first: int, last: int) -> Tensor:
        """The tensor; of packed experts those from `first` until `last`."""
        places = self._located.places
        if self._packed and places[0][1].expert is not None:  # They lie together there, too.
            part, place = places[0]
            return _taken(part, place, read(place.name, last - first)[first:last])
        rows = []
        for part, place in places[first:last]:
            tensor = read(place.name)
            rows.append(_taken(part, place, tensor if place.expert is None else tensor[place.expert]))
        return torch.stack(rows) if self._packed else rows[0]


def _taken(part: Part, place: Place, tensor: Tensor) -> Tensor:
    """What `place` means of its tensor, of one expert or several, as Hugging Face's format has it."""
    if not place.as_ours:
        return tensor if place.rows is None else tensor[place.rows]
    return part.taken_from(tensor)


def _name_of(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def checkpoint_as_hf(folder: Path, model: nn.Module, keys: HFKeys) -> HFCheckpoint:
    """The weights of one of our checkpoints as a folder of Hugging Face's format, after `verify_checkpoint`.

    Raises:
        CheckpointError: for files that are damaged, or weights that do not fit `model`.
    """
    try:
        tensors = DCPTensors(folder, HuggingFaceStorageReader(str(folder)))
    except Exception as error:  # Whatever safetensors raises for a file that is none.
        raise CheckpointError(f"checkpoint {folder}: cannot read its files: {error}") from error

    def convention(name: str, expert: int | None, part: Part) -> Place:
        return our_rows(f"model.{name}", expert, part)

    weights = tensors.as_hf(locate(model, keys, convention))
    weights.check(model, keys)
    return weights
