"""Folders of torch's distributed checkpoint that others have written, read without running what is in them.

Their `.metadata` is a pickle, and a pickle may call whatever it names. Here it may name what such metadata is made of,
and each of these names stands for a class that does nothing; torch's metadata is then built from what it holds. The
tensors are read by torch's own reader, which unpickles tensors and nothing else.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from crossdock.checkpoint.dcp_tensors import DCPTensors
from crossdock.checkpoint.folders import CheckpointError

__all__ = ["METADATA_FILE", "open_foreign"]

METADATA_FILE = ".metadata"
"""What tells a DCP checkpoint of another library."""

_DCP = "torch.distributed.checkpoint"


class _Inert:
    """What a pickle has put into an instance of a class, by name, or as it is where that is no dict."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.state = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _admitted() -> dict[tuple[str, str], Any]:
    """What metadata may name, and what stands for it.

    Made anew for each file: a pickle may set attributes of a class, too.
    """
    records = {
        f"{_DCP}.metadata": (
            "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
            "TensorStorageMetadata"
        ),
        f"{_DCP}.filesystem": "_StorageInfo",
    }
    admitted: dict[tuple[str, str], Any] = {
        (module, name): type(name, (_Inert,), {}) for module, names in records.items() for name in names.split()
    }
    # Where it was saved, in what layout, and (Python 3.11.2 looks it up by getattr) in what memory format: not needed.
    nothing = (
        (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
        ("builtins", "getattr"),
        ("torch.serialization", "_get_layout"),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    )
    admitted |= {name: lambda *_: None for name in nothing}
    admitted |= {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}
    dtypes = ((name, value) for name, value in vars(torch).items() if isinstance(value, torch.dtype))
    return admitted | {("torch", name): dtype for name, dtype in dtypes}


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.admitted = _admitted()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is none of DCP's own metadata classes")
        return self.admitted[module, name]


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def open_foreign(folder: Path) -> DCPTensors:
    """The tensors of a folder that torch's distributed checkpoint has written.

    Raises:
        CheckpointError: for metadata that cannot be read, that names what it has no need of, or that leads out of the
            folder or beyond the end of a file.
    """
    path = folder / METADATA_FILE
    try:
        with open(path, "rb") as file:
            found = _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # A damaged pickle may raise anything.
        raise CheckpointError(f"cannot read {path}: {error}") from error
    try:
        metadata = _metadata(found)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: it is no metadata of {_DCP} ({error})") from None
    _check_places(folder, metadata)
    return DCPTensors(folder, _Reader(folder, metadata))


def _metadata(found: Any) -> Metadata:
    """torch's metadata with what a pickle's stand-in holds of it."""
    state = _state(found, "Metadata")
    tensors: dict[str, Any] = {}
    for name, about in state["state_dict_metadata"].items():
        tensors[str(name)] = (
            BytesStorageMetadata() if type(about).__name__ == "BytesStorageMetadata" else _tensor(name, about)
        )
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for index, info in state["storage_data"].items():
        key, value = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
        offset = key.get("offset")
        place = MetadataIndex(str(key["fqn"]), None if offset is None else _sizes(offset))
        if not isinstance(value["relative_path"], str):
            raise ValueError(f"{place.fqn} is in {value['relative_path']!r}")
        if value.get("transform_descriptors"):
            raise ValueError(f"{place.fqn} is stored as {value['transform_descriptors']}, not as it is")
        offset, length = _sizes([value["offset"], value["length"]])
        storage[place] = _StorageInfo(value["relative_path"], offset, length)
    return Metadata(tensors, storage_data=storage)


def _tensor(name: str, about: Any) -> TensorStorageMetadata:
    state = _state(about, "TensorStorageMetadata")
    dtype, size = state["properties"].state[0], _sizes(state["size"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is {dtype!r}")
    chunks = []
    for chunk in state["chunks"]:
        piece = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(piece["offsets"]), _sizes(piece["sizes"])
        ends = [offset + length for offset, length in zip(offsets, sizes, strict=True)]
        if any(end > length for end, length in zip(ends, size, strict=True)):
            raise ValueError(f"{name} has a piece from {list(offsets)} to {ends}, its shape is {list(size)}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if _overlap(chunks):
        raise ValueError(f"{name} has pieces that lie over each other")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _overlap(chunks: list[ChunkStorageMetadata]) -> bool:
    """Whether two pieces have a value in common."""
    ordered = sorted(chunks, key=lambda chunk: tuple(chunk.offsets))
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 :]:
            if first.offsets and second.offsets[0] >= first.offsets[0] + first.sizes[0]:
                break
            ranges = zip(first.offsets, first.sizes, second.offsets, second.sizes, strict=True)
            if all(max(start, other) < min(start + size, other + length) for start, size, other, length in ranges):
                return True
    return False


def _state(found: Any, name: str) -> Mapping[str, Any]:
    if type(found).__name__ != name or not isinstance(found, _Inert) or not isinstance(found.state, dict):
        raise ValueError(f"{type(found).__name__} where {name} should be")
    return found.state


def _sizes(values: Any) -> torch.Size:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"sizes are {values!r}")
    return torch.Size(values)


def _check_places(folder: Path, metadata: Metadata) -> None:
    """Refuse places outside of the folder and beyond the end of its files, and pieces that are nowhere."""
    lengths: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        path = info.relative_path
        if path not in lengths:
            if path in ("", "..") or Path(path).name != path:
                raise CheckpointError(f"{folder}: {index.fqn} is in {path!r}, which is no file of this folder")
            if not (folder / path).is_file():
                raise CheckpointError(f"{folder}: {path}, which holds {index.fqn}, is missing")
            lengths[path] = (folder / path).stat().st_size
        if info.offset + info.length > lengths[path]:
            raise CheckpointError(f"{folder}: {path} is cut off: {index.fqn} reaches beyond its end")
    by_place = sorted(metadata.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset))
    for (first, there), (second, here) in pairwise(by_place):
        shared = there.relative_path == here.relative_path and here.offset < there.offset + there.length
        if shared and here.length:
            raise CheckpointError(f"{folder}: {second.fqn} and {first.fqn} share bytes of {here.relative_path}")
    for name, about in metadata.state_dict_metadata.items():
        if isinstance(about, TensorStorageMetadata) and math.prod(about.size):
            for chunk in about.chunks:
                if MetadataIndex(name, chunk.offsets) not in metadata.storage_data:
                    raise CheckpointError(f"{folder}: {name} has a piece at {list(chunk.offsets)} that is in no file")
