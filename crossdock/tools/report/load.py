"""`expert_load.bin`, `rank_load.bin`: routes of each logical expert, or rank, in each layer (docs/report.md)."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import xxhash

__all__ = ["LOAD_FILE", "RANK_LOAD_FILE", "LoadFileError", "LoadLog", "read_load"]

logger = logging.getLogger(__name__)

LOAD_FILE = "expert_load.bin"
"""In a run folder, beside metrics.jsonl: the routes of every expert."""
RANK_LOAD_FILE = "rank_load.bin"
"""In the same form, of every expert-parallel rank."""
# One of each, so that neither is taken for the other.
_MAGIC = MappingProxyType(
    {LOAD_FILE: int.from_bytes(b"XDLD", "little"), RANK_LOAD_FILE: int.from_bytes(b"XDLR", "little")}
)
_VERSION = 2
_HEADER_WORDS = 5
_WORD = np.dtype("<i4")


class LoadFileError(ValueError):
    """A file that holds no loads, or those of another version; the message names it."""


class LoadLog:
    """Appends to a file of loads. Records after `resumed_step`, of a run that broke off, are dropped.

    A file of another shape, or of something else, is set aside under a name that is told in a warning.

    Args:
        path: of the file, whose name is `LOAD_FILE` or `RANK_LOAD_FILE`.
        layers: `L`, the model's MoE layers.
        width: `E`, logical experts of each, or ranks.
        resumed_step: the last step that counts, 0 for a new run.

    Raises:
        OSError: where the file cannot be written.
    """

    def __init__(self, path: Path, layers: int, width: int, resumed_step: int) -> None:
        self._shape = (layers, width)
        kept = _size_up_to(path, self._shape, resumed_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        os.ftruncate(self._file.fileno(), kept)
        if not kept:
            self._append(np.array([_MAGIC[path.name], _VERSION, layers, width, 0], dtype=_WORD))

    def write(self, step: int, counts: torch.Tensor) -> None:
        """Add the `counts` `[L, E]` of one step; those above 2^31 - 1 are written as that number.

        Raises:
            OSError: where the disk is full, for example; the file is then as it was before.
        """
        if counts.shape != self._shape:
            raise ValueError(f"counts have shape {tuple(counts.shape)}, not {self._shape}")
        words = np.empty(2 + counts.numel(), dtype=_WORD)
        words[0] = step
        words[1:-1] = counts.flatten().clamp(max=2**31 - 1).cpu().numpy()
        self._append(words)

    def close(self) -> None:
        self._file.close()

    def _append(self, words: np.ndarray) -> None:
        """Add `words`, the last of which becomes their checksum."""
        words[-1] = _checksum(words[:-1])
        size = os.fstat(self._file.fileno()).st_size
        data = words.tobytes()
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise


def read_load(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """The loads in a file.

    Returns:
        `steps` `[N]` and `counts` `[N, L, E]`, int32, read-only: the file is mapped, not read. And how many records
        are left out of them: a last one that was cut off, and those whose checksums tell that they are damaged.

    Raises:
        LoadFileError: for a file of something else, or a damaged header.
        OSError: for one that cannot be read.
    """
    records, shape, is_cut = _records(path)
    whole = _whole(records)
    kept = records if whole.all() else records[whole]
    return kept[:, 0], kept[:, 1:-1].reshape(len(kept), *shape), int((~whole).sum()) + is_cut


def _records(path: Path) -> tuple[np.ndarray, tuple[int, int], bool]:
    """All records of a file `[N, 1 + L * E + 1]`, damaged or not, `(L, E)`, and whether a part of one is at its end.

    Raises as `read_load`.
    """
    header = np.fromfile(path, dtype=_WORD, count=_HEADER_WORDS)
    # A file under another name may be of either kind.
    magic = [_MAGIC[path.name]] if path.name in _MAGIC else _MAGIC.values()
    if len(header) < _HEADER_WORDS or header[0] not in magic:
        raise LoadFileError(f"{path} holds no loads")
    if header[1] != _VERSION:
        raise LoadFileError(f"{path} has version {header[1]}; this crossdock reads {_VERSION}")
    layers, width = (int(size) for size in header[2:4])
    # A product of two that are negative would be positive.
    if header[4] != _checksum(header[:4]) or min(layers, width) < 1 or layers * width >= 2**31:
        raise LoadFileError(f"{path} is damaged: it says that it has {layers} layers of {width} loads")
    words = 2 + layers * width
    offset = _HEADER_WORDS * _WORD.itemsize
    records, part = divmod(path.stat().st_size - offset, words * _WORD.itemsize)
    if records < 1:
        return np.empty((0, words), _WORD), (layers, width), part > 0
    return np.memmap(path, dtype=_WORD, mode="r", offset=offset, shape=(records, words)), (layers, width), part > 0


def _whole(records: np.ndarray) -> np.ndarray:
    """`[N]` bool: which records are what was written."""
    return np.array([record[-1] == _checksum(record[:-1]) for record in records], dtype=bool)


def _checksum(words: np.ndarray) -> np.int32:
    """XXH32 of some words, as a word."""
    return np.frombuffer(xxhash.xxh32(words.tobytes()).intdigest().to_bytes(4, "little"), _WORD)[0]


def _size_up_to(path: Path, shape: tuple[int, int], resumed_step: int) -> int:
    """Bytes of the header and of whole records of steps up to `resumed_step`; 0 where the file is to be begun.

    A damaged record among them stays where it is: readers leave it out, and say so.
    """
    header_bytes = _HEADER_WORDS * _WORD.itemsize
    if not path.is_file():
        return 0
    if path.stat().st_size < header_bytes:
        logger.warning("%s is cut off, and begun again", path)
        return 0
    records, is_cut = np.empty((0, 2), _WORD), False
    try:
        records, found, is_cut = _records(path)
        problem = "" if found == shape else f"{path} has layers and loads {found}, not {shape}"
    except LoadFileError as error:
        problem = str(error)
    if problem:
        aside = _free_name(path)
        path.rename(aside)
        logger.warning("%s; it is now %s", problem, aside.name)
        return 0
    whole = _whole(records)
    if not whole.all():
        logger.warning("%s: %s of its %s records are damaged; reports leave them out", path, (~whole).sum(), len(whole))
    if is_cut:
        logger.warning("%s: its last record is cut off, and dropped", path)
    later = np.flatnonzero(whole & (records[:, 0] > resumed_step))
    kept = int(later[0]) if len(later) else len(records)
    return header_bytes + kept * (2 + shape[0] * shape[1]) * _WORD.itemsize


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return aside
