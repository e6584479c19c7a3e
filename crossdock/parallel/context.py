"""Context parallelism: a rank has a part of every sequence, attention sees whole ones (Ulysses, arXiv 2309.14509)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.comm import Splits, exchange, gather_rows
from crossdock.parallel.mesh import ContextMethod, LayoutError, Meshes, nearest

__all__ = ["SequenceContext", "apply_cp", "check_heads"]


# Dynamo cannot follow an exchange's start and wait; typed, since torch's decorator hides the signature of a method.
_uncompiled: Any = torch.compiler.disable


class SequenceContext(nn.Module):
    """The ranks that share sequences, as a module that mixes positions sees them: this one alone, until `apply_cp`.

    Rank `r` of `R` has positions `r*S/R .. (r+1)*S/R - 1` of every sequence of `S`. It has no parameters; as a child of
    a module it says that this one computes with it, and `apply_cp` finds it by its class.

    Args:
        num_heads: query heads of the attention that it is for, on all ranks.
        method: `ulysses` exchanges heads for positions; `ring` sends keys and values round.
    """

    def __init__(self, num_heads: int, method: ContextMethod = "ulysses") -> None:
        super().__init__()
        self.num_heads, self.method = num_heads, method
        self.rank, self.size, self._group_name = 0, 1, ""

    def place(self, group: dist.ProcessGroup) -> None:
        """Share sequences with the ranks of `group`, in their order."""
        self.rank, self.size, self._group_name = group.rank(), group.size(), group.group_name

    @_uncompiled
    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All heads at this rank's positions, for this rank's heads at all positions. One exchange; differentiable.

        Key heads whose number `R` does not divide are repeated first, so that each query head finds the key head that
        is its own on the same rank: `R / gcd(key heads, R)` times, the least that does.

        Args:
            query: `[B, heads, S/R, D]`.
            key: `[B, key heads, S/R, D]`; the number of heads is a multiple of that of key heads.
            value: `[B, key heads, S/R, D']`.

        Returns:
            Query `[B, heads/R, S, D]`, key and value with as many heads as each other and `D` and `D'` as before.

        Raises:
            ValueError: where `R` does not divide the query heads.
        """
        if self.size == 1:
            return query, key, value
        if query.shape[1] % self.size:
            raise ValueError(f"{query.shape[1]} query heads do not divide over {self.size} ranks")
        repeats = self.size // math.gcd(key.shape[1], self.size)
        if repeats > 1:
            key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
        batch, _, positions, _ = query.shape
        heads = [each.unflatten(1, (self.size, -1)).permute(1, 0, 3, 2, 4) for each in (query, key, value)]
        shapes = [each.shape[3:] for each in heads]
        rows = torch.cat([each.flatten(3) for each in heads], dim=-1)  # [R, B, S/R, their sizes]
        received = self._exchange(rows).transpose(0, 1).reshape(batch, self.size * positions, -1)
        parts = received.split([math.prod(shape) for shape in shapes], dim=-1)
        whole = [part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]
        return whole[0], whole[1], whole[2]

    @_uncompiled
    def to_positions(self, output: Tensor) -> Tensor:
        """`to_heads` back: `[B, S, heads/R, D]` of this rank's heads to `[B, S/R, heads, D]`. One exchange."""
        if self.size == 1:
            return output
        received = self._exchange(output.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(3))  # [R, B, S/R, ...]
        return received.unflatten(-1, output.shape[2:]).permute(1, 2, 0, 3, 4).flatten(2, 3)

    @_uncompiled
    def ring(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `ring_attention`."""
        # Here, since it stands on what is not public in torch, which nothing else needs.
        from crossdock.parallel.ring import ring_attention

        group = dist.distributed_c10d._resolve_process_group(self._group_name)  # type: ignore[arg-type]
        return ring_attention(query, key, value, scale, group)

    def own_heads(self, per_head: Tensor) -> Tensor:
        """Of a value for each head `[heads]`, those of this rank's heads in `to_heads`."""
        return per_head.chunk(self.size)[self.rank]

    def whole(self, values: Tensor) -> Tensor:
        """`[..., S/R]` of this rank to `[..., S]`, the same on all ranks. Without a gradient; collective."""
        if self.size == 1:
            return values
        rows = values.detach().movedim(-1, 0)
        gathered = gather_rows(rows, [len(rows)] * self.size, self._group_name).wait()
        return gathered.movedim(0, -1).contiguous()

    def _exchange(self, parts: Tensor) -> Tensor:
        """Part `r` of `[R, ...]` to rank `r`; what arrives lies in the order of the ranks that it comes from."""
        rows = parts.flatten(0, -2)
        each = [len(rows) // self.size] * self.size
        return exchange(rows, Splits(each, each), self._group_name).wait().view(parts.shape)

    def extra_repr(self) -> str:
        return f"rank {self.rank} of {self.size}"


def apply_cp(model: nn.Module, meshes: Meshes) -> nn.Module:
    """Let the ranks of `meshes.cp` share sequences, in place. Does nothing where there is one.

    From then on the model takes each rank's part of every sequence, see `SequenceContext`, and gives logits for it.

    Args:
        model: with modules that compute with a `SequenceContext`, such as transformers' after
            `crossdock.models.accept_context_parallel`.
        meshes: from `ParallelDims.build_mesh`.

    Returns:
        `model`.

    Raises:
        LayoutError: where the ranks do not divide the query heads.
        ValueError: where no module computes with a `SequenceContext`.
    """
    if meshes.cp is None:
        return model
    check_heads(model, meshes.cp.size(), meshes.size("tp"), meshes.size("fsdp"))
    for context in _contexts(model):
        context.place(meshes.cp)
    return model


def check_heads(model: nn.Module, cp: int, tp: int, num_ranks: int) -> None:
    """Refuse a model whose query heads do not divide over the ranks that share sequences.

    Args:
        model: see `apply_cp`.
        cp: ranks that share a sequence.
        tp: ranks that share a matrix; each of them has `1 / tp` of the heads.
        num_ranks: `dp_shard x cp`, of which another `cp` would take its ranks.

    Raises:
        LayoutError: where `cp x tp` does not divide a layer's query heads, unless keys and values go round.
        ValueError: where no module computes with a `SequenceContext`.
    """
    contexts = _contexts(model)
    num_heads = sorted({context.num_heads for context in contexts if context.method == "ulysses"})
    if not contexts:
        raise ValueError(
            f"{cp} ranks share sequences (cp), but no attention of the model knows how: call "
            "crossdock.models.accept_context_parallel(model) first"
        )
    working = [
        degree
        for degree in range(1, num_ranks + 1)
        if num_ranks % degree == 0 and not any(heads % (degree * tp) for heads in num_heads)
    ]
    if cp in working:
        return
    times = f" / tensor_parallel_degree = {tp}" if tp > 1 else ""
    fitting = f"{', '.join(map(str, working))}; the nearest is {nearest(cp, working)}" if working else "there is none"
    raise LayoutError(
        "context_parallel_degree",
        cp,
        f"must divide the model's query heads ({', '.join(map(str, num_heads))}{times}) and the {num_ranks} ranks of "
        f"dp_shard x cp: {fitting}",
    )


def _contexts(model: nn.Module) -> list[SequenceContext]:
    return [module for module in model.modules() if isinstance(module, SequenceContext)]
