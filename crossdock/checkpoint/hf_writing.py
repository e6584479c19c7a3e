"""Writing safetensors files of a given size as their tensors come, on one rank or on several at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.checkpoint.folders import CheckpointError
from crossdock.checkpoint.hf_files import DTYPES, INDEX_FILE, SINGLE_FILE

__all__ = ["MAX_SHARD_BYTES", "Entry", "ShardWriter", "file_numbers"]

MAX_SHARD_BYTES = 5 * 10**9
"""Of a file, unless told."""
_ALIGNMENT = 8


def file_numbers(sizes: Iterable[int], max_bytes: int) -> Iterator[int]:
    """The number of the file, from 1, that each tensor of `sizes` goes to: in order, what is too large alone."""
    number, held = 1, 0
    for size in sizes:
        if held and held + size > max_bytes:
            number, held = number + 1, 0
        held += size
        yield number


class Entry(NamedTuple):
    """A tensor that will be written.

    Attributes:
        name: in the file.
        dtype: of `DTYPES`.
        shape: of all of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class ShardWriter:
    """The files of this rank, and the index of those of all ranks. Collective where there is a process group.

    All sizes are told beforehand, since a file begins with them: then a tensor can be written when it is there, in
    pieces, and needs not stay in memory. (The package safetensors writes whole files alone.) A context manager, which
    closes the file that is open.

    Args:
        folder: exists; the same one for all ranks.
        entries: what this rank will write, in this order.
        max_bytes: of a file's tensors, unless one is larger by itself.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], max_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        numbered = zip(file_numbers((entry.num_bytes for entry in entries), max_bytes), entries, strict=True)
        own = [[entry for _, entry in file] for _, file in groupby(numbered, key=itemgetter(0))]
        everyone, rank = [own], 0
        if dist.is_initialized():
            rank, everyone = dist.get_rank(), [own] * dist.get_world_size()
            dist.all_gather_object(everyone, own)
        files = [file for files in everyone for file in files]
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
        self._files = dict(zip(names if len(files) > 1 else [SINGLE_FILE], files, strict=True))
        first = sum(map(len, everyone[:rank]))
        own_names = list(self._files)[first : first + len(own)]
        self._own = iter([(name, entry) for name in own_names for entry in self._files[name]])
        self._file: IO[bytes] | None = None
        self._open_name = ""
        self._entry: Entry | None = None
        self._missing_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, values: Tensor) -> None:
        """Write the next values, in order: an entry's, or a part of them, in any dtype and on any device.

        Raises:
            OSError: where the file cannot be written.
            CheckpointError: for more values than were told.
        """
        if self._missing_bytes == 0:
            name, self._entry = next(self._own)
            self._missing_bytes = self._entry.num_bytes
            if name != self._open_name:
                self._close()
                self._file = open(self.folder / name, "wb")  # noqa: SIM115 (closed before the next one opens)
                self._open_name = name
                self._file.write(_header(self._files[name]))
        assert self._file is not None
        assert self._entry is not None
        stored = values.to("cpu", DTYPES[self._entry.dtype]).contiguous().flatten().view(torch.uint8)
        if stored.nbytes > self._missing_bytes:
            raise CheckpointError(
                f"{self._entry.name}: {stored.nbytes} bytes come where {self._missing_bytes} are left"
            )
        self._file.write(stored.numpy().data)
        self._missing_bytes -= stored.nbytes

    def write_index(self) -> None:
        """Where there are several files: which one holds what. One rank does this.

        Raises:
            OSError: where it cannot be written.
        """
        if len(self._files) == 1:
            return
        weight_map = {entry.name: file for file, entries in self._files.items() for entry in entries}
        size = sum(entry.num_bytes for entries in self._files.values() for entry in entries)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _close(self) -> None:
        file, self._file, self._open_name = self._file, None, ""
        if file is not None:
            file.close()


def _header(entries: Sequence[Entry]) -> bytes:
    """How a safetensors file of these tensors, in this order, begins: the length of a JSON object, and that."""
    about: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        ends = [offset, offset := offset + entry.num_bytes]
        about[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": ends}
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
