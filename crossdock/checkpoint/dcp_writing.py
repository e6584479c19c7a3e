"""Writing a rank's tensors to safetensors files, from where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

__all__ = ["DCPWriter"]


class DCPWriter(HuggingFaceStorageWriter):
    """torch's writer of safetensors, each rank its own files, without its two copies of every file's tensors.

    Tensors go to the file from where they are, and Python's lock is free meanwhile, for a step that goes on.

    Args:
        folder: exists.
        files: which of a rank's files, from 1, holds a name; the same on all ranks.
    """

    def __init__(self, folder: Path, files: dict[str, int]) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files. Raises OSError."""
        items_of_file: dict[int, list[WriteItem]] = {}
        if plan.items:
            # They came with the plan, from the first rank.
            files, shard = plan.storage_data["fqn_to_index_mapping"], plan.storage_data["shard_index"]
            for item in plan.items:
                items_of_file.setdefault(files[item.index.fqn], []).append(item)
            last = max(files.values())
            for file, items in items_of_file.items():
                path = Path(self.path, f"shard-{shard:05d}-model-{file:05d}-of-{last:05d}.safetensors")
                _write(path, items, planner)
        # What torch would tell the first rank of every tensor, nobody reads.
        written: Future[list[WriteResult]] = Future()
        written.set_result([])
        return written


def _write(path: Path, items: list[WriteItem], planner: SavePlanner) -> None:
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for item in items:
        value = planner.resolve_data(item)
        assert isinstance(value, Tensor)
        assert item.tensor_data is not None
        tensors[item.index.fqn] = value.detach().cpu()
        offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
    metadata = {
        CUSTOM_METADATA_KEY: json.dumps(offsets),
        DCP_VERSION_KEY: str(HF_DCP_VERSION),
        FORMAT_KEY: FORMAT_VALUE,
    }
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # An OSError inside: no space left, for instance.
        raise OSError(f"{path.name}: {error}") from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())
