"""Writing weights in Hugging Face's format: one tensor per expert, from any layout, on all ranks together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crossdock.checkpoint.folders import CheckpointError
from crossdock.checkpoint.hf import HFKeys, Part, views_of
from crossdock.checkpoint.hf_files import DTYPES, INDEX_FILE, SINGLE_FILE
from crossdock.comm import raise_together
from crossdock.moe import moe_layers
from crossdock.parallel import plain_name

__all__ = ["as_stored", "save_hf"]

_FILE_BYTES = 2 * 2**30


@torch.no_grad()
def save_hf(model: nn.Module, keys: HFKeys, folder: Path, dtypes: Mapping[str, str], default_dtype: str) -> None:
    """Write the weights of `model` into an existing folder, with an index. Collective; on any layout.

    The experts are written by the ranks that hold them (the first of those that share them), all else by the first
    rank, in files of some 2 GiB: no rank holds more than that beside its part of the model. Where a layer's experts are
    packed in one tensor, all ranks hold that for a moment and the first one writes it.

    Args:
        model: its weights.
        keys: of its family.
        folder: the same one for all ranks.
        dtypes: of tensors by name, for those that shall not have `default_dtype`.
        default_dtype: one of `DTYPES`.

    Raises:
        CheckpointError: on all ranks, if a file could not be written.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    groups = [layer.ep_group for layer in moe_layers(model).values() if layer.ep_group is not None]
    writes_experts = 0 in dist.get_process_group_ranks(groups[0]) if groups else rank == 0
    writer = _Writer(folder, f"part-{rank:05d}")
    error: Exception | None = None
    # First of all, since it makes FSDP shard again what a forward pass has left gathered.
    model.state_dict()
    for part, view, of_one_expert in _parts_of(model, keys):
        # Collective: it goes on after an error, since other ranks wait for this one's part.
        whole = view.full_tensor() if isinstance(view, DTensor) else view
        if error is not None or not (writes_experts if of_one_expert else rank == 0):
            continue
        try:
            writer.add(part.name, as_stored(part, whole).to("cpu", DTYPES[dtypes.get(part.name, default_dtype)]))
        except (OSError, RuntimeError, SafetensorError) as caught:  # RuntimeError: no memory for it.
            error = caught
    try:
        writer.flush()
    except (OSError, SafetensorError) as caught:
        error = error or caught
    raise_together(error and CheckpointError(f"cannot write the weights below {folder}: {error}"))
    written = [writer]
    if dist.is_initialized():
        written = [writer] * dist.get_world_size()
        dist.all_gather_object(written, writer)
    error = None
    if rank == 0:
        try:
            _finish(folder, written)
        except OSError as caught:
            error = CheckpointError(f"cannot write the weights below {folder}: {caught}")
    raise_together(error)


def _parts_of(model: nn.Module, keys: HFKeys) -> Iterator[tuple[Part, Tensor, bool]]:
    """Every tensor of a checkpoint, what it is made of, and whether that is one expert, on the ranks that hold it."""
    for name, expert, view in views_of(model, keys):
        if expert is None or not keys.packed:
            yield from ((part, view, expert is not None) for part in keys.parts(name, expert, view.shape))
    if not keys.packed:
        return
    for layer_name, layer in moe_layers(model).items():
        for name, parameter in layer.experts.named_parameters():
            (part,) = keys.parts(plain_name(f"{layer_name}.experts.{name}"), 0, parameter.shape[1:])
            slots = torch.tensor(layer.placement.expert_to_slot, device=parameter.device)
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield part, whole.detach()[slots], False


def as_stored(part: Part, whole: Tensor) -> Tensor:
    """What a checkpoint's tensor holds of a parameter, an expert of it, or (packed) all its experts."""
    if part.interleaved:
        return torch.stack(whole.chunk(2, dim=-1), dim=-1).flatten(-2)
    piece = whole if part.columns is None else whole[:, part.columns]
    return piece.t() if part.transposed else piece


class _Writer:
    """One rank's files: tensors are collected, and written when there are enough of them."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.names_of_file: dict[str, list[str]] = {}
        self.total_bytes = 0
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        # A copy of its own: the whole of which this is a part must not stay, and a view is no tensor of a file.
        self._tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._num_bytes += tensor.nbytes
        if self._num_bytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._tensors:
            return
        file = f"{self.prefix}-{len(self.names_of_file):05d}.safetensors"
        save_file(self._tensors, self.folder / file, metadata={"format": "pt"})
        self.names_of_file[file] = list(self._tensors)
        self.total_bytes += self._num_bytes
        self._tensors, self._num_bytes = {}, 0


def _finish(folder: Path, written: list[_Writer]) -> None:
    """Give the files of all ranks their final names, and write the index where there are several."""
    names_of_file = {file: names for writer in written for file, names in writer.names_of_file.items()}
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(sorted(names_of_file.items()), start=1):
        final = f"model-{number:05d}-of-{len(names_of_file):05d}.safetensors"
        if len(names_of_file) == 1:
            final = SINGLE_FILE
        (folder / file).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(names_of_file) > 1:
        metadata = {"total_size": sum(writer.total_bytes for writer in written)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
