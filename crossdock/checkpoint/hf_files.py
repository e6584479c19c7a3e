"""Safetensors files of a folder in Hugging Face's format: what their headers say, and reading parts of tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossdock.checkpoint.folders import CheckpointError
from crossdock.checkpoint.pickles import pickle_refusal

__all__ = ["DTYPES", "INDEX_FILE", "QUANTIZED_DTYPES", "SINGLE_FILE", "Header", "OpenFiles", "read_headers"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
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
QUANTIZED_DTYPES: Mapping[str, torch.dtype] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
"""Those that can be read as a part of quantised weights."""


class Header(NamedTuple):
    """What a file says of a tensor."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]


class OpenFiles:
    """The files of a folder, each opened when it is first read from. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._files.clear()

    def read(self, header: Header, bounds: Sequence[tuple[int, int]]) -> Tensor:
        """What lies within `bounds`, of each dimension: in memory of its own, and no more than that is read."""
        if header.file not in self._files:
            self._files[header.file] = self._stack.enter_context(safe_open(self.folder / header.file, framework="pt"))
        stored = self._files[header.file].get_slice(header.name)
        return stored[tuple(slice(*ends) for ends in bounds)]


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of a folder, by name.

    Raises:
        CheckpointError: for a folder without safetensors, a file that is missing, cut off or none, and a tensor that
            is in two files or not where the index says.
    """
    index = _read_index(folder)
    files = sorted(set(index.values())) if index else [SINGLE_FILE]
    headers: dict[str, Header] = {}
    for file in files:
        for name, header in _read_header(folder, file).items():
            if name in headers:
                raise CheckpointError(f"{folder}: {name} is in {headers[name].file} and in {file}")
            headers[name] = header
    for name, file in index.items():
        if name not in headers or headers[name].file != file:
            raise CheckpointError(f"{folder}: {INDEX_FILE} says that {name} is in {file}, where it is not")
    return headers


def _read_index(folder: Path) -> dict[str, str]:
    """The file of every tensor, empty where there is one file and no index."""
    path = folder / INDEX_FILE
    if not path.is_file():
        if not (folder / SINGLE_FILE).is_file():
            missing = f"{folder} holds no weights: neither {INDEX_FILE} nor {SINGLE_FILE}"
            raise CheckpointError(pickle_refusal(folder) or missing)
        return {}
    try:
        index = json.loads(path.read_text())["weight_map"]
        outside = [name for name, file in index.items() if not _is_name(file)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): it must hold a weight_map of names to files") from None
    if not index:
        raise CheckpointError(f"{path} must hold a weight_map of names to files in the same folder; it is empty")
    if outside:
        wrong = f"{outside[0]} is in {index[outside[0]]!r}"
        raise CheckpointError(f"{path} says that {wrong}; it must be the name of a file in the same folder")
    return index


def _is_name(file: Any) -> bool:
    """Whether it names a file in the same folder, and leads nowhere else."""
    return isinstance(file, str) and Path(file).name == file and file not in ("", "..")


def _read_header(folder: Path, file: str) -> dict[str, Header]:
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
        headers = {name: Header(name, file, about["dtype"], tuple(about["shape"])) for name, about in header.items()}
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
    return headers


def _fills(about: Mapping[str, Any]) -> bool:
    """Whether a header's entry gives a tensor as many bytes as its shape needs; true for dtypes that are not read."""
    dtype = {**DTYPES, **QUANTIZED_DTYPES}.get(about["dtype"])
    first, end = about["data_offsets"]
    return dtype is None or end - first == math.prod(about["shape"]) * dtype.itemsize
