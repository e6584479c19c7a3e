"""Embedding and head split by tokens of the vocabulary, and the loss of logits that no rank has whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from crossdock.comm import enter_parts, gather_parts, join_parts, sum_over_ranks, sum_terms
from crossdock.parallel.shards import local_part

__all__ = ["VocabularyEmbedding", "VocabularyHead", "VocabularySplit"]

_all_reduce = torch.ops._c10d_functional.all_reduce.default
_wait = torch.ops._c10d_functional.wait_tensor.default


class VocabularySplit(NamedTuple):
    """How the ranks of `group` share the vocabulary, in equal parts.

    Attributes:
        group: the ranks of `tp`.
        sequence_parallel: whether what the head is given is a part of each sequence.
    """

    group: dist.ProcessGroup
    sequence_parallel: bool

    def enter(self, hidden: Tensor) -> Tensor:
        """What the head is given, `[B, S, H]` of all tokens."""
        return gather_parts(hidden, 1, self.group) if self.sequence_parallel else enter_parts(hidden, self.group)

    def join(self, logits: Tensor) -> Tensor:
        """This rank's logits `[..., V/R]` to all `[..., V]`."""
        return join_parts(logits, -1, self.group)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """This rank's share of the sum of the cross entropies; the shares sum to it, and all have its gradient.

        `-log softmax(z)_y = log sum_v exp(z_v - m) + m - z_y` with `m = max_v z_v`: maximum and both sums are over the
        ranks, three exchanges of a number per token.

        Args:
            logits: `[..., V/R]` in fp32 or wider.
            labels: `[...]`; those below 0 are left out.
        """
        first = self.group.rank() * logits.shape[-1]
        return _Loss.apply(logits.flatten(0, -2), labels.flatten(), first, self.group.group_name, self.group.rank())  # type: ignore[return-value]


class VocabularyHead(nn.Module):
    """An output projection, `weight [V, H]`, that can be split by tokens of the vocabulary.

    Attributes:
        split: `None` where it is whole.
    """

    weight: Tensor
    split: VocabularySplit | None = None


class VocabularyEmbedding(nn.Embedding):
    """An embedding whose rank holds the rows of its part of the vocabulary; the others give 0 for a token."""

    split: VocabularySplit

    @classmethod
    def of(cls, embedding: nn.Embedding, weight: nn.Parameter, split: VocabularySplit) -> VocabularyEmbedding:
        """`embedding` with a part of its rows as `weight`."""
        with torch.device("meta"):
            made = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        made.weight, made.split = weight, split
        return made

    def forward(self, input: Tensor) -> Tensor:
        """`[B, S]` tokens to `[B, S, H]`, the same on all ranks."""
        weight = local_part(self.weight)
        first = self.split.group.rank() * len(weight)
        own = (input >= first) & (input < first + len(weight))
        padding = None if self.padding_idx is None else self.padding_idx - first
        padding = None if padding is None or not 0 <= padding < len(weight) else padding
        rows = F.embedding((input - first).clamp(0, len(weight) - 1), weight, padding)
        return sum_terms(rows.masked_fill(~own[..., None], 0), self.split.group)


class _Loss(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group_name: str, rank: int) -> Tensor:
        largest = _wait(_all_reduce(logits.amax(dim=-1), "max", group_name))
        exponentials = (logits - largest[:, None]).exp()
        own = (labels >= first) & (labels < first + logits.shape[-1])
        index = (labels - first).clamp(0, logits.shape[-1] - 1)[:, None]
        chosen = logits.gather(1, index).squeeze(1).masked_fill(~own, 0)
        sums = sum_over_ranks(torch.stack([exponentials.sum(dim=-1), chosen]), group_name)
        counted = labels >= 0
        ctx.save_for_backward(exponentials.div_(sums[0][:, None]), index, own, counted)
        losses = (sums[0].log() + largest - sums[1]).masked_fill(~counted, 0)
        return losses.sum() if rank == 0 else losses.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        probabilities, index, own, counted = ctx.saved_tensors
        gradient = probabilities.scatter_add(1, index, -own.to(probabilities.dtype)[:, None])
        return gradient * (counted * grads[0])[:, None], None, None, None, None
