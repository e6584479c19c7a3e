"""Initial weights that are the same for every layout, made shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from crossdock.lora import adapters_of
from crossdock.models.norm import RMSNorm
from crossdock.moe import moe_layers
from crossdock.parallel import local_with_offsets, plain_name
from crossdock.placement import EMPTY

__all__ = ["draw_row", "initialise_weights"]


@torch.no_grad()
def initialise_weights(model: nn.Module, seed: int, std: float, *, adapters_alone: bool = False) -> None:
    """Fill all parameters of `model` in place: matrices from N(0, std^2), vectors named `weight` with 1, others with 0.

    A norm that adds 1 to its weight gets 0 too. Of an adapter (`crossdock.lora`), `A` for `n` inputs is from
    N(0, 1 / 3n) and `B` is 0.

    Each row of a matrix, and each expert, has a generator of its own, seeded by (seed, name of the parameter, row or
    logical expert). A rank draws only the rows it holds, so the model never exists as a whole, and the values depend
    neither on the layout nor on the device.

    Args:
        model: materialised; parameters may be DTensors.
        seed: of the run.
        std: standard deviation, the family's `initializer_range`.
        adapters_alone: leave all but the adapters as they are.
    """
    expert_ids = {
        parameter: layer.local_expert_ids
        for layer in moe_layers(model).values()
        for parameter in layer.experts.slot_parameters().values()
    }
    norms = (module for module in model.modules() if isinstance(module, RMSNorm))
    around_zero = {norm.weight for norm in norms if norm.formula.offset}
    generator = torch.Generator()
    adapters = adapters_of(model)
    for name, parameter in (adapters if adapters_alone else dict(model.named_parameters())).items():
        local, offsets = local_with_offsets(parameter)
        if parameter.ndim == 1:
            local.fill_(1.0 if name.endswith("weight") and parameter not in around_zero else 0.0)
            continue
        if parameter in expert_ids:
            rows: Iterator[tuple[int, int]] = ((s, e) for s, e in enumerate(expert_ids[parameter]) if e != EMPTY)
            local.zero_()
        else:
            rows = ((row, row + offsets[0]) for row in range(len(local)))
        deviation = std
        if name in adapters:
            deviation = 0.0 if name.endswith("lora_b") else (3 * parameter.shape[1]) ** -0.5
        for row, index in rows:
            values = draw_row(parameter.shape[1:], seed, plain_name(name), index, generator) * deviation
            for dim, (offset, size) in enumerate(zip(offsets[1:], local.shape[1:], strict=True)):
                values = values.narrow(dim, offset, size)
            local[row].copy_(values)


def draw_row(
    shape: Sequence[int], seed: int, name: str, index: int, generator: torch.Generator | None = None
) -> Tensor:
    """Values from N(0, 1) that depend on the seed, the parameter's name and the row or logical expert alone.

    Args:
        shape: of the row.
        seed, name, index: of the run, of the parameter, and which row.
        generator: one to use; what it was before does not matter.
    """
    generator = generator or torch.Generator()
    digest = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=8).digest()
    generator.manual_seed(int.from_bytes(digest) >> 1)
    return torch.randn(tuple(shape), generator=generator)
