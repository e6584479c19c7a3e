"""Writing one of our checkpoints from weights in Hugging Face's format, a file at a time, in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from crossdock.checkpoint.dcp_writing import DCPWriter
from crossdock.checkpoint.folders import CheckpointError, finish, make_room
from crossdock.checkpoint.hf import HFCheckpoint, HFKeys, read_part, views_of
from crossdock.checkpoint.hf_files import OpenFiles
from crossdock.checkpoint.hf_writing import file_numbers

__all__ = ["stream_checkpoint"]

_FILE_BYTES = 128 * 2**20


@torch.no_grad()
def stream_checkpoint(
    weights: HFCheckpoint, model: nn.Module, keys: HFKeys, folder: Path, progress: Callable[[int, int], None]
) -> None:
    """Write `weights` as the checkpoint of step 0 below `folder`, as `Checkpointer.save` does without an optimizer.

    Args:
        weights: checked ones.
        model: what they are of, on the meta device, with the dtype that they shall have.
        keys: of its family.
        folder: of checkpoints.
        progress: called now and then with bytes that are written, and all of them.

    Raises:
        CheckpointError, OSError, RuntimeError, SafetensorError: where tensors could not be read or files not written.
    """
    final = folder / "step-00000000"
    partial = final.with_name(f".{final.name}.partial")
    make_room(partial)
    held = {
        f"model.{name}" if expert is None else f"model.{name}.{expert}": (name, expert, view)
        for name, expert, view in views_of(model, keys)
    }
    file_of = dict(zip(held, file_numbers((view.nbytes for _, _, view in held.values()), _FILE_BYTES), strict=True))
    # What the format has no place for begins as in a new model: expert biases, with 0.
    persistent = model.state_dict().keys()
    buffers = {f"model.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}
    tensors = {name: torch.zeros_like(own, device="cpu") for name, own in buffers.items() if name not in held}
    file_of |= dict.fromkeys(tensors, 1)
    checksums: dict[str, str] = {}
    done, total = 0, sum(view.nbytes for _, _, view in held.values())
    with OpenFiles(weights.folder) as opened:
        for _, names in groupby(held, key=file_of.__getitem__):
            for stored in names:
                name, expert, view = held[stored]
                value = tensors[stored] = torch.empty_like(view, device="cpu")
                for part in keys.parts(name, expert, view.shape):
                    read_part(opened, weights.tensors[part.name], part, value, (0,) * value.ndim)
                done += value.nbytes
            checksums |= _save(tensors, partial, file_of)
            tensors = {}
            progress(done, total)
    counters = {"step": 0, "samples": 0, "skipped_steps": 0}
    state = {"step": 0, "world_size": 1, "random_states": [], "counters": counters, "weights_only": True}
    finish(partial, final, state, checksums)


def _save(tensors: dict[str, Tensor], folder: Path, file_of: dict[str, int]) -> dict[str, str]:
    """Write one file, beside those that are there; returns its checksum by its name."""
    writer = DCPWriter(folder, file_of)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            dcp.save(tensors, storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"cannot write below {folder}: {type(cause).__name__}: {cause}") from None
    return writer.checksums
