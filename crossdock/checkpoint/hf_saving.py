"""Writing weights in Hugging Face's format: from any layout, by all ranks in parallel, as they are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crossdock.checkpoint.experts import ExpertRows
from crossdock.checkpoint.folders import CheckpointError
from crossdock.checkpoint.hf import HFKeys, Part, views_of
from crossdock.checkpoint.hf_writing import MAX_SHARD_BYTES, Entry, ShardWriter
from crossdock.comm import raise_together
from crossdock.lora import base_of
from crossdock.moe import moe_layers
from crossdock.parallel import plain_name, stages_of
from crossdock.routed_experts import RoutedExperts

__all__ = ["save_hf"]


@torch.no_grad()
def save_hf(
    model: nn.Module,
    keys: HFKeys,
    folder: Path,
    dtypes: Mapping[str, str],
    default_dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights of `model` into an existing folder, with an index. Collective; on any layout.

    All ranks write, each its own files: an expert is written by one of the ranks that hold it, all else by the rank
    that has least to write. A rank holds a few matrices beside its part of the model, whole layers never.

    Args:
        model: its weights.
        keys: of its family.
        folder: the same one for all ranks.
        dtypes: of tensors by name, for those that shall not have `default_dtype`.
        default_dtype: one of `DTYPES`.
        max_shard_bytes: of a file's tensors.

    Raises:
        CheckpointError: on all ranks, if a file could not be written.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    # First of all, since it makes FSDP shard again what a forward pass has left gathered.
    model.state_dict()
    sources = list(_sources_of(model, keys))
    entries = [
        Entry(name, dtypes.get(name, default_dtype), shape)
        for source in sources
        for name, shape in source.tensors.items()
        if source.writer == rank
    ]
    error: Exception | None = None
    with ShardWriter(folder, entries, max_shard_bytes) as writer:
        for source in sources:
            # Collective: it goes on after an error, since other ranks wait for this one's part.
            for values in source.gather():
                if source.writer != rank or error is not None:
                    continue
                try:
                    writer.write(values)
                except (OSError, RuntimeError) as caught:  # RuntimeError: no memory for it.
                    error = caught
    if rank == 0 and error is None:
        try:
            writer.write_index()
        except OSError as caught:
            error = caught
    raise_together(error and CheckpointError(f"cannot write the weights below {folder}: {error}"))


class _Source(NamedTuple):
    """One or more tensors of a checkpoint, of which this rank has a part.

    Attributes:
        tensors: names and shapes.
        writer: the rank that writes them.
        gather: their values in order, in pieces. Collective among the ranks that have a part.
    """

    tensors: dict[str, tuple[int, ...]]
    writer: int
    gather: Callable[[], Iterator[Tensor]]


def _sources_of(model: nn.Module, keys: HFKeys) -> Iterator[_Source]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stages = stages_of(model)
    ranks = list(range(world_size)) if stages is None else stages.ranks
    # Several groups of ranks may hold the same experts: the first one writes them.
    layers = list(moe_layers(model).values())
    in_first_group = all(layer.is_first_replica for layer in layers)
    is_alone = not layers or layers[0].ep_group is None
    written = dict.fromkeys(ranks, 0)

    def next_writer(size: int) -> int:
        """For what all ranks have: whoever has least of that so far."""
        writer = min(ranks, key=written.__getitem__)
        written[writer] += size
        return writer

    of_one_rank = ExpertRows(model).unpacked
    packed: dict[tuple[str, int], Tensor] = {}
    for index, (name, expert, view) in enumerate(views_of(model, keys)):
        if expert is not None and keys.packed:
            packed[name, expert] = view
            continue
        if expert is None and name not in of_one_rank:
            writer = next_writer(view.numel())
        elif isinstance(view, DTensor):
            holders = dist.get_process_group_ranks(view.device_mesh.get_group())
            writer = holders[index % len(holders)] if in_first_group else -1
        else:
            writer = rank if in_first_group and (rank == ranks[0] or not is_alone) else -1
        parts = keys.parts(name, expert, view.shape)
        yield _Source({part.name: part.shape_of(view.shape) for part in parts}, writer, partial(_gather, view, parts))
    for layer_name, layer in moe_layers(model).items() if keys.packed else ():
        base = base_of(layer.experts)
        for key, parameter in layer.experts.slot_parameters().items():
            if key not in base:
                continue
            name = plain_name(f"{layer_name}.experts.{key}")
            own = {expert: view for (of, expert), view in packed.items() if of == name}
            (part,) = keys.parts(name, 0, parameter.shape[1:])
            tensors = {part.name: (layer.num_experts, *part.shape_of(parameter.shape[1:]))}
            gather = partial(_gather_packed, layer, own, part, parameter)
            yield _Source(tensors, next_writer(parameter.numel()), gather)


def _gather(view: Tensor, parts: Sequence[Part]) -> Iterator[Tensor]:
    whole = _whole(view)
    yield from (part.taken_from(whole) for part in parts)


def _gather_packed(layer: RoutedExperts, own: Mapping[int, Tensor], part: Part, parameter: Tensor) -> Iterator[Tensor]:
    """All experts of a layer, one after another, from the ranks that hold them."""
    buffer = torch.empty(parameter.shape[1:], dtype=parameter.dtype, device=layer.load.tokens.device)
    for expert, row in enumerate(layer.placement.expert_to_row):
        if expert in own:
            buffer.copy_(_whole(own[expert]))
        if layer.ep_group is not None:
            dist.broadcast(buffer, group=layer.ep_group, group_src=row // layer.placement.rows_per_rank)
        yield part.taken_from(buffer)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
