"""Writing a rank's tensors to safetensors files, from where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
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
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from crossdock.checkpoint.checksums import checksum_of_parts

__all__ = ["DCPWriter", "write_shard"]

# A safetensors file begins with the length of its header.
_LENGTH_BYTES = 8


class DCPWriter(HuggingFaceStorageWriter):
    """torch's writer of safetensors, each rank its own files, without its two copies of every file's tensors.

    Tensors go to the file from where they are, and Python's lock is free meanwhile, for a step that goes on. Checksums
    are those of the values in memory, so that what the disk makes of them is checked too.

    Args:
        folder: exists.
        files: which of a rank's files, from 1, holds a name; the same on all ranks.

    Attributes:
        checksums: of all ranks' files, by name, on the first rank when all is written.
    """

    def __init__(self, folder: Path, files: dict[str, int]) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self.checksums: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files. Raises OSError."""
        items_of_file: dict[int, list[WriteItem]] = {}
        # What torch would tell the first rank of every tensor, nobody reads: it is told of files.
        results: list[WriteResult] = []
        if plan.items:
            # They came with the plan, from the first rank.
            files, shard = plan.storage_data["fqn_to_index_mapping"], plan.storage_data["shard_index"]
            for item in plan.items:
                items_of_file.setdefault(files[item.index.fqn], []).append(item)
            last = max(files.values())
            for file, items in items_of_file.items():
                path = Path(self.path, f"shard-{shard:05d}-model-{file:05d}-of-{last:05d}.safetensors")
                written = _write(path, items, planner)
                results.append(WriteResult(MetadataIndex(path.name), path.stat().st_size, written))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Take the checksums of all ranks; torch calls it on the first."""
        self.checksums = {each.index.fqn: each.storage_data for of_rank in results for each in of_rank}


def _write(path: Path, items: list[WriteItem], planner: SavePlanner) -> str:
    """Write one file; returns its checksum."""
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, list[int]] = {}
    for item in items:
        value = planner.resolve_data(item)
        assert isinstance(value, Tensor)
        assert item.tensor_data is not None
        tensors[item.index.fqn] = value.detach().cpu()
        offsets[item.index.fqn] = list(item.tensor_data.chunk.offsets)
    return write_shard(path, tensors, offsets)


def write_shard(path: Path, tensors: dict[str, Tensor], offsets: dict[str, list[int]]) -> str:
    """Write a file as torch's distributed checkpoint has them, and bring it to the disk; returns its checksum.

    Args:
        path: of the file.
        tensors: by name, contiguous, on the CPU.
        offsets: where each begins in the whole one of that name.

    Raises:
        OSError: where it cannot be written.
    """
    metadata = {
        CUSTOM_METADATA_KEY: json.dumps({name: {SAVED_OFFSETS_KEY: offset} for name, offset in offsets.items()}),
        DCP_VERSION_KEY: str(HF_DCP_VERSION),
        FORMAT_KEY: FORMAT_VALUE,
    }
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # An OSError inside: no space left, for instance.
        raise OSError(f"{path.name}: {error}") from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        length = int.from_bytes(head := file.read(_LENGTH_BYTES), "little")
        header = file.read(length)
    places = {name: about["data_offsets"] for name, about in json.loads(header).items() if name in tensors}
    in_order = sorted((name for name in places if tensors[name].numel()), key=places.__getitem__)
    return checksum_of_parts([head, header, *(_bytes_of(tensors[name]) for name in in_order)])


def _bytes_of(tensor: Tensor) -> memoryview:
    """What a file holds of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
