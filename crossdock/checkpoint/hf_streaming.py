"""Writing weights in Hugging Face's format tensor by tensor: a file of any size takes the memory of one tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from crossdock.checkpoint.hf import HFCheckpoint
from crossdock.checkpoint.hf_files import DTYPES, INDEX_FILE, SINGLE_FILE, OpenFiles

__all__ = ["stream_hf"]


@torch.no_grad()
def stream_hf(
    weights: HFCheckpoint,
    folder: Path,
    dtype_of: Callable[[str], str],
    file_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write all of `weights`, in their order, into an existing folder, with an index where there are several files.

    safetensors' own `save_file` holds a file's bytes in memory, some of them twice.

    Args:
        weights: checked ones.
        folder: without weights so far.
        dtype_of: of `DTYPES`, by a tensor's name.
        file_bytes: a file is no larger, unless one tensor is.
        progress: called now and then with bytes that are written, and all of them.

    Raises:
        CheckpointError, OSError, RuntimeError, SafetensorError: where tensors could not be read or files not written.
    """
    sizes = {name: _num_bytes(stored.shape, dtype_of(name)) for name, stored in weights.tensors.items()}
    files = list(_files(sizes, file_bytes))
    weight_map: dict[str, str] = {}
    total, done = sum(sizes.values()), 0
    with OpenFiles(weights.folder) as opened:
        for number, names in enumerate(files, start=1):
            file = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            # A tensor begins at a multiple of its values' size where larger ones come first.
            names = sorted(names, key=lambda name: -DTYPES[dtype_of(name)].itemsize)
            with open(folder / file, "xb") as written:
                shapes = {name: weights.tensors[name].shape for name in names}
                written.write(_header(shapes, {name: dtype_of(name) for name in names}))
                for name in names:
                    whole = weights.tensors[name].read(opened, [(0, size) for size in shapes[name]])
                    _write(written, whole.to(DTYPES[dtype_of(name)]))
                    done += sizes[name]
                    progress(done, total)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _files(sizes: Mapping[str, int], file_bytes: int) -> Iterator[list[str]]:
    """The names of each file's tensors, in their order."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > file_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _header(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with, its tensors following in order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + _num_bytes(shape, dtypes[name])
        header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _write(file: object, tensor: Tensor) -> None:
    """The values of a tensor, little endian as all machines are that torch runs on."""
    file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[attr-defined]
