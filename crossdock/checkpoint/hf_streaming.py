"""Writing weights that are read as they are written: tensor by tensor, from one format to Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from crossdock.checkpoint.hf import HFCheckpoint
from crossdock.checkpoint.hf_files import OpenFiles
from crossdock.checkpoint.hf_writing import Entry, ShardWriter

__all__ = ["stream_hf"]


@torch.no_grad()
def stream_hf(
    weights: HFCheckpoint,
    folder: Path,
    dtype_of: Callable[[str], str],
    max_shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write all of `weights`, in their order, into an existing folder. In one process.

    Args:
        weights: checked ones.
        folder: without weights so far.
        dtype_of: of `DTYPES`, by a tensor's name.
        max_shard_bytes: of a file's tensors.
        progress: called now and then with bytes that are written, and all of them.

    Raises:
        CheckpointError, OSError, RuntimeError, SafetensorError: where tensors could not be read or files not written.
    """
    entries = [Entry(name, dtype_of(name), stored.shape) for name, stored in weights.tensors.items()]
    done, total = 0, sum(entry.num_bytes for entry in entries)
    with OpenFiles(weights.folder) as opened, ShardWriter(folder, entries, max_shard_bytes) as writer:
        for entry in entries:
            writer.write(weights.tensors[entry.name].read(opened, [(0, size) for size in entry.shape]))
            done += entry.num_bytes
            progress(done, total)
        writer.write_index()
