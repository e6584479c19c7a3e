"""Auxiliary losses of the router, and the autograd node that carries them (docs/semantics.md, "Losses and bias").

Both losses enter the graph as gradients only: `attach_losses` is the identity on the layer's output, so that the
reported language-model loss stays pure, and adds the losses' gradient in its backward pass. The same node counts the
tokens per expert in its backward, once per forward pass, under recompute and any pipeline schedule alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from crossdock.comm import sum_over_ranks
from crossdock.routing.counting import count_experts
from crossdock.routing.load import LoadCounter, Observed, is_recompute
from crossdock.routing.router import Routing

__all__ = [
    "BatchTotals",
    "LossCoefficients",
    "attach_losses",
    "count_in_backward",
    "router_losses",
    "switch_loss",
    "z_loss",
]


@dataclass(frozen=True)
class LossCoefficients:
    """Weights of the auxiliary losses; `0` switches one off.

    Attributes:
        sequence_aux: Switch loss per sequence, averaged over the sequences of the global batch.
        batch_aux: Switch loss of a rank's micro-batch.
        global_aux: Switch loss of the global batch, with counts that run up within the step.
        z: mean squared log-sum-exp of the logits.
    """

    sequence_aux: float = 0.0
    batch_aux: float = 0.0
    global_aux: float = 0.0
    z: float = 0.0

    def active(self) -> dict[str, float]:
        """The coefficient of each loss that is on, by the name under which its value is recorded."""
        named = {
            "sequence_aux_loss": self.sequence_aux,
            "batch_aux_loss": self.batch_aux,
            "global_aux_loss": self.global_aux,
            "z_loss": self.z,
        }
        return {name: coefficient for name, coefficient in named.items() if coefficient}


@dataclass(frozen=True)
class BatchTotals:
    """The global batch, which a micro-batch's losses are a share of.

    Attributes:
        sequences: rows.
        tokens: unpadded ones, more than 0.
        group_name: of the process group whose ranks share the batch; `None` for this rank alone.
        sequence_group_name: of that whose ranks share sequences, each having a part of every one; likewise.
        sum_copies: sums a tensor in place over further copies of the model, each with a part of the batch.
    """

    sequences: int
    tokens: int
    group_name: str | None = None
    sequence_group_name: str | None = None
    sum_copies: Callable[[Tensor], None] | None = None


def switch_loss(
    probabilities: Tensor, expert_ids: Tensor, mask: Tensor, group_name: str | None = None
) -> tuple[Tensor, Tensor]:
    """Switch auxiliary loss of each of `B` groups of tokens; 1 under perfect balance.

    `L = E / (K T^2) * sum_e n_e * sum_t p_te` (Switch Transformer, eq. 4 to 6, for top-k). With `f_e = n_e / (T K)` the
    share of routes and `P_e = sum_t p_te / T` the mean probability this is `E * sum_e f_e P_e`; at `f_e = P_e = 1 / E`
    it is `E * E / E^2 = 1`. `n_e` carries no gradient, `p_te` does.

    Args:
        probabilities: `[B, S, E]`, rows sum to 1.
        expert_ids: `[B, S, K]`, `-1` where there is no route.
        mask: `[B, S]` bool, true for tokens that count (`T` of them per group).
        group_name: of the ranks that each have a part of every group of tokens: `n_e` and `T` are sums over them, in
            one collective, and `p_te` is of this rank's tokens, so that the ranks' shares sum to the loss.

    Returns:
        The loss `[B]`, 0 for a group without tokens, and `T` `[B]`.
    """
    num_experts = probabilities.shape[-1]
    top_k = expert_ids.shape[-1]
    counts = count_experts(expert_ids, num_experts)
    probability_sums = (probabilities * mask[..., None]).sum(dim=1)
    counts = torch.cat([counts, mask.sum(dim=1, keepdim=True)], dim=1)
    if group_name is not None:
        counts = sum_over_ranks(counts, group_name)
    counts, tokens = counts[:, :-1], counts[:, -1]
    scale = num_experts / (top_k * tokens.clamp_min(1).to(probabilities.dtype) ** 2)
    return scale * (counts * probability_sums).sum(dim=-1), tokens


def z_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """`sum_t logsumexp(logits_t)^2` over the tokens of `mask` `[T]`, a scalar (ST-MoE, eq. 5, before the mean)."""
    return (logits.logsumexp(dim=-1).square() * mask).sum()


def router_losses(
    routing: Routing,
    coefficients: LossCoefficients,
    sequence_shape: tuple[int, ...],
    padding_mask: Tensor | None,
    totals: BatchTotals | None,
    load: LoadCounter,
) -> dict[str, Tensor]:
    """This micro-batch's share of each loss that is on, before its coefficient; the shares sum to the global loss.

    Args:
        routing: the router's decision for `T` tokens.
        coefficients: which losses are on.
        sequence_shape: the shape of the tokens, `(B, S)`; a sequence is a row.
        padding_mask: `[T]` bool or `None`.
        totals: the global batch; `None` where this micro-batch is all of it.
        load: what the step has counted so far, for the `global` level.
    """
    if not coefficients.active():
        return {}
    num_tokens = len(routing.logits)
    sequence_length = sequence_shape[-1] if sequence_shape else 1
    mask = routing.logits.new_ones(num_tokens, dtype=torch.bool) if padding_mask is None else ~padding_mask
    unpadded = mask.sum()
    sequences = num_tokens // max(sequence_length, 1)
    if totals is None:
        totals = BatchTotals(max(sequences, 1), 1)
        token_share: Tensor | float = 1.0 / unpadded.clamp_min(1).to(routing.logits.dtype)
    else:
        token_share = 1.0 / totals.tokens
    probabilities = routing.scores / (routing.scores.sum(dim=-1, keepdim=True) + 1e-20)

    def switch(groups: int) -> tuple[Tensor, Tensor]:
        shape = (groups, num_tokens // max(groups, 1))
        return switch_loss(
            probabilities.view(*shape, probabilities.shape[-1]),
            routing.expert_ids.view(*shape, routing.expert_ids.shape[-1]),
            mask.view(shape),
            totals.sequence_group_name,
        )

    losses: dict[str, Tensor] = {}
    if coefficients.sequence_aux:
        losses["sequence_aux_loss"] = switch(sequences)[0].sum() / totals.sequences
    if coefficients.batch_aux:
        loss, tokens = switch(1)
        losses["batch_aux_loss"] = (loss * tokens).squeeze(0) * token_share
    if coefficients.global_aux:
        losses["global_aux_loss"] = _global_switch_loss(
            (probabilities * mask[:, None]).sum(dim=0) * token_share, routing, unpadded, totals, load
        )
    if coefficients.z:
        losses["z_loss"] = z_loss(routing.logits, mask) * token_share
    return losses


def _global_switch_loss(
    mean_probability: Tensor, routing: Routing, unpadded: Tensor, totals: BatchTotals, load: LoadCounter
) -> Tensor:
    """`E sum_e f_e P_e`, with `f_e` of all tokens of the step until now and `P_e` this micro-batch's share of the mean.

    With one micro-batch per rank, the shares sum to the Switch loss of the global batch. One collective, functional:
    selective recompute keeps its result; earlier micro-batches are counted when their backward pass has run.
    """
    num_experts, top_k = routing.logits.shape[-1], routing.expert_ids.shape[-1]
    seen = torch.cat([load.tokens_per_expert, load.tokens[None]])
    seen = seen + torch.cat([count_experts(routing.expert_ids, num_experts), unpadded[None]])
    if totals.group_name is not None:
        seen = sum_over_ranks(seen, totals.group_name)
    if totals.sum_copies is not None:
        seen = seen.clone()  # What recompute keeps of it is summed anew.
        totals.sum_copies(seen)
    frequency = seen[:-1].to(mean_probability.dtype) / (seen[-1] * top_k).clamp_min(1)
    return num_experts * (frequency * mean_probability).sum()


def attach_losses(
    output: Tensor,
    routing: Routing,
    losses: dict[str, Tensor],
    coefficients: LossCoefficients,
    load: LoadCounter,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Identity on `output` `[T, H]`; its backward adds the losses' gradient and counts tokens per expert, once.

    An output without a gradient, of a layer all of which is frozen, is never reached by a backward pass: its tokens are
    counted at once.
    """
    weights = coefficients.active()
    total = sum((weights[name] * loss for name, loss in losses.items()), start=routing.logits.new_zeros(()))
    routes = routing.counts
    if routes is None:
        routes = count_experts(routing.expert_ids, routing.logits.shape[-1])
    tokens = routes.new_full((), len(routing.logits)) if padding_mask is None else (~padding_mask).sum()
    observed = Observed(routes, tokens, routes.new_zeros(()) if routing.dropped is None else routing.dropped)
    return _attach(output, total, observed, {name: loss.detach() for name, loss in losses.items()}, load)


def count_in_backward(
    output: Tensor, expert_ids: Tensor, num_experts: int, load: LoadCounter, padding_mask: Tensor | None = None
) -> Tensor:
    """`attach_losses` without losses, for `expert_ids` `[T, K]` of any router."""
    routes = count_experts(expert_ids, num_experts)
    tokens = routes.new_full((), len(expert_ids)) if padding_mask is None else (~padding_mask).sum()
    observed = Observed(routes, tokens, routes.new_zeros(()))
    return _attach(output, output.new_zeros(()), observed, {}, load)


def _attach(output: Tensor, loss: Tensor, observed: Observed, values: dict[str, Tensor], load: LoadCounter) -> Tensor:
    if not output.requires_grad:
        if not is_recompute():
            load.record(observed, values)
        return output
    return _AttachLosses.apply(output, loss, observed, values, load)  # type: ignore[return-value]


class _AttachLosses(Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, loss: Tensor, observed: Observed, values: dict[str, Tensor], load: LoadCounter
    ) -> Tensor:
        # Plain attributes, not saved tensors: saved tensors of a checkpointed region are computed again.
        ctx.observed, ctx.values, ctx.load = observed, values, load
        ctx.loss_dtype, ctx.loss_device = loss.dtype, loss.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Once per forward pass, though a graph that is retained can run backward again.
        if ctx.load is not None:
            ctx.load.record(ctx.observed, ctx.values)
            ctx.load = None
        return grads[0], torch.ones((), dtype=ctx.loss_dtype, device=ctx.loss_device), None, None, None
