"""A router's decision in one kernel each way: scores, the `K` best experts, their weights, and how many chose each.

The formulas are those of `crossdock.routing.Router` (docs/semantics.md, "Router"), without groups of experts, which
that computes step by step. With scores `s`, weights `w_k = c s_k / S` of the chosen ones, `S` their sum and an epsilon,
the incoming gradients `dw` and `ds` give

    ds_k += c (dw_k - sum_j dw_j s_j / S) / S       unnormalised: c dw_k
    dl = s (ds - sum_e s_e ds_e)                    softmax
    dl = s (1 - s) ds                               sigmoid
    dl = (1 - exp(-s^2)) / (2 s) ds                 sqrt(softplus)

and a softmax `p` over the chosen alone adds `c p_k (dw_k - sum_j p_j dw_j)` to the logits' gradient. The lowest index
wins a tie. It has not run on hardware yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.kernels.runtime import cdiv, device_of, jit, runs, tl
from crossdock.kernels.sort import counting_sort_reference

__all__ = ["Decision", "Scoring", "decide", "decide_reference"]

# Values of a block: a few rows of all experts.
_BLOCK_VALUES = 2048


class Scoring(NamedTuple):
    """How experts are chosen and weighed; as in `RouterConfig` of crossdock/routing.

    Attributes:
        top_k: `K`.
        score_function: `softmax`, `sigmoid` or `sqrt_softplus`.
        over_chosen: whether weights are a softmax over the chosen logits, by which they are chosen then.
        normalise: whether a token's weights are divided by their sum.
        scale: multiplies the weights, `c`.
    """

    top_k: int
    score_function: str = "softmax"
    over_chosen: bool = False
    normalise: bool = True
    scale: float = 1.0


class Decision(NamedTuple):
    """A router's, for `T` tokens.

    Attributes:
        expert_ids: `[T, K]` int64, best first; `-1` for padding.
        weights: `[T, K]` fp32; 0 for padding.
        scores: `[T, E]` fp32, without the bias.
        counts: `[E]` int64, routes per expert.
    """

    expert_ids: Tensor
    weights: Tensor
    scores: Tensor
    counts: Tensor


def decide(
    logits: Tensor, scoring: Scoring, expert_bias: Tensor | None = None, padding_mask: Tensor | None = None
) -> Decision:
    """Choose `K` of `E` experts for each token.

    Args:
        logits: `[T, E]` fp32.
        scoring: how.
        expert_bias: `[E]` fp32, added for the choice alone.
        padding_mask: `[T]` bool, true for tokens that get no expert.

    Returns:
        With the gradient of `logits` through weights and scores. NaN counts as the largest score.
    """
    if not runs(logits, expert_bias, padding_mask):
        return decide_reference(logits, scoring, expert_bias, padding_mask)
    return Decision(*_Decide.apply(logits, scoring, expert_bias, padding_mask))  # type: ignore[misc]


def decide_reference(
    logits: Tensor, scoring: Scoring, expert_bias: Tensor | None = None, padding_mask: Tensor | None = None
) -> Decision:
    """What `decide` computes, in torch's own operations and with their gradient; float64 too."""
    match scoring.score_function:
        case "softmax":
            scores = logits.softmax(dim=1)
        case "sigmoid":
            scores = logits.sigmoid()
        case _:
            scores = F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    by = (logits if scoring.over_chosen else scores).detach()
    # Stable: the lowest index wins a tie.
    best = (by if expert_bias is None else by + expert_bias).sort(dim=1, descending=True, stable=True)
    expert_ids = best.indices[:, : scoring.top_k]
    if scoring.over_chosen:
        weights = logits.gather(1, expert_ids).softmax(dim=1)
    else:
        weights = scores.gather(1, expert_ids)
        if scoring.normalise:
            weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    weights = weights * scoring.scale
    if padding_mask is not None:
        expert_ids = expert_ids.masked_fill(padding_mask[:, None], -1)
        weights = weights.masked_fill(padding_mask[:, None], 0)
    counts = counting_sort_reference(expert_ids, logits.shape[1]).counts
    return Decision(expert_ids, weights, scores, counts)


class _Decide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: Tensor, scoring: Scoring, expert_bias: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = logits.contiguous()
        expert_bias, padding_mask = (
            None if each is None else each.contiguous() for each in (expert_bias, padding_mask)
        )
        (num_tokens, num_experts), device, top_k = logits.shape, logits.device, scoring.top_k
        expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
        weights = torch.empty(num_tokens, top_k, device=device)
        scores = torch.empty_like(logits)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        if num_tokens:
            with device_of(logits):
                _decide_kernel[_grid(num_tokens, num_experts)](
                    *(logits, expert_bias, padding_mask, expert_ids, weights, scores, counts, num_tokens, num_experts),
                    scoring.scale,
                    **_constants(scoring, num_experts),
                )
        ctx.scoring = scoring
        ctx.save_for_backward(expert_ids, weights, scores)
        ctx.mark_non_differentiable(expert_ids, counts)
        return expert_ids, weights, scores, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, _: None, grad_weights: Tensor, grad_scores: Tensor, *rest: None):  # type: ignore[override]
        expert_ids, weights, scores = ctx.saved_tensors
        num_tokens, num_experts = scores.shape
        grad = torch.empty_like(scores)
        if num_tokens:
            with device_of(scores):
                _decide_grad_kernel[_grid(num_tokens, num_experts)](
                    *(expert_ids, weights, scores, grad_weights.contiguous(), grad_scores.contiguous(), grad),
                    *(num_tokens, num_experts, ctx.scoring.scale),
                    **_constants(ctx.scoring, num_experts),
                )
        return grad, None, None, None


def _rows(num_experts: int) -> int:
    return max(1, _BLOCK_VALUES >> (num_experts - 1).bit_length())


def _grid(num_tokens: int, num_experts: int) -> tuple[int]:
    return (cdiv(num_tokens, _rows(num_experts)),)


def _constants(scoring: Scoring, num_experts: int) -> dict[str, object]:
    """Both kernels' constant arguments; experts and choices in powers of two."""
    return {
        "SCORES": scoring.score_function,
        "OVER_CHOSEN": scoring.over_chosen,
        "NORMALISE": scoring.normalise,
        "TOP_K": scoring.top_k,
        "ROWS": _rows(num_experts),
        "COLUMNS": 1 << (num_experts - 1).bit_length(),
        "CHOICES": 1 << (scoring.top_k - 1).bit_length(),
        "EPSILON": 1e-20,
        "TINY": torch.finfo(torch.float32).tiny,
    }


@jit
def _decide_kernel(
    logits_ptr,  # [num_tokens, num_experts]
    bias_ptr,  # [num_experts] or None
    padding_ptr,  # [num_tokens] or None
    ids_ptr,  # [num_tokens, TOP_K]
    weights_ptr,  # [num_tokens, TOP_K]
    scores_ptr,  # [num_tokens, num_experts]
    counts_ptr,  # [num_experts], zeros
    num_tokens,
    num_experts,
    scale,
    SCORES: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
    EPSILON: tl.constexpr,
    TINY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    is_expert = column < num_experts
    mask = (row < num_tokens)[:, None] & is_expert
    at = row[:, None] * num_experts + column
    logits = tl.load(logits_ptr + at, mask=mask, other=float("-inf"))
    if SCORES == "softmax":
        exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = exponentials / tl.sum(exponentials, axis=1)[:, None]
    elif SCORES == "sigmoid":
        scores = tl.sigmoid(logits)
    else:
        # log(1 + e) to the last digits, whatever was lost in 1 + e. By comparison: a maximum would drop NaN.
        small = tl.exp(-tl.abs(logits))
        rounded = 1 + small
        logarithm = tl.where(rounded == 1, small, tl.log(rounded) * (small / tl.where(rounded == 1, 1, rounded - 1)))
        softplus = tl.where(logits < 0, 0, logits) + logarithm
        scores = tl.sqrt(tl.where(softplus < TINY, TINY, softplus))
    tl.store(scores_ptr + at, scores, mask=mask)

    values = logits if OVER_CHOSEN else scores
    order = values
    if bias_ptr is not None:
        order += tl.load(bias_ptr + column, mask=is_expert, other=0)
    order = tl.where(order != order, float("inf"), order)
    is_left = mask
    choice = tl.arange(0, CHOICES)[None, :]
    ids = tl.full([ROWS, CHOICES], -1, tl.int32)
    chosen = tl.full([ROWS, CHOICES], 0, tl.float32)
    for k in tl.static_range(TOP_K):  # pyright: ignore[reportGeneralTypeIssues]
        best = tl.max(tl.where(is_left, order, float("-inf")), axis=1)[:, None]
        index = tl.min(tl.where(is_left & (order == best), column, COLUMNS), axis=1)[:, None]
        ids = tl.where(choice == k, index, ids)
        value = tl.sum(tl.where(column == index, values, 0), axis=1)[:, None]
        chosen = tl.where(choice == k, value, chosen)
        is_left = is_left & (column != index)

    if OVER_CHOSEN:
        in_use = tl.where(choice < TOP_K, chosen, float("-inf"))
        weights = tl.exp(in_use - tl.max(in_use, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
    else:
        weights = chosen
        if NORMALISE:
            weights = weights / (tl.sum(weights, axis=1)[:, None] + EPSILON)
    weights *= scale
    takes_part = row < num_tokens
    if padding_ptr is not None:
        takes_part = takes_part & (tl.load(padding_ptr + row, mask=row < num_tokens, other=1) == 0)
    to = row[:, None] * TOP_K + choice
    in_use = (row < num_tokens)[:, None] & (choice < TOP_K)
    tl.store(ids_ptr + to, tl.where(takes_part[:, None], ids, -1), mask=in_use)
    tl.store(weights_ptr + to, tl.where(takes_part[:, None], weights, 0), mask=in_use)
    # Sums of whole numbers are the same in any order.
    counts = tl.sum((mask & (is_left == 0) & takes_part[:, None]).to(tl.int64), axis=0)
    expert = tl.arange(0, COLUMNS)
    tl.atomic_add(counts_ptr + expert, counts, mask=(expert < num_experts) & (counts > 0))


@jit
def _decide_grad_kernel(
    ids_ptr,  # [num_tokens, TOP_K]
    weights_ptr,  # [num_tokens, TOP_K]
    scores_ptr,  # [num_tokens, num_experts]
    grad_weights_ptr,  # [num_tokens, TOP_K]
    grad_scores_ptr,  # [num_tokens, num_experts]
    grad_ptr,  # [num_tokens, num_experts]
    num_tokens,
    num_experts,
    scale,
    SCORES: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
    EPSILON: tl.constexpr,
    TINY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_tokens)[:, None] & (column < num_experts)
    at = row[:, None] * num_experts + column
    scores = tl.load(scores_ptr + at, mask=mask, other=0)
    grad_scores = tl.load(grad_scores_ptr + at, mask=mask, other=0)
    grad_logits = tl.zeros([ROWS, COLUMNS], tl.float32)

    choice = tl.arange(0, CHOICES)[None, :]
    of = row[:, None] * TOP_K + choice
    in_use = (row < num_tokens)[:, None] & (choice < TOP_K)
    experts = tl.load(ids_ptr + of, mask=in_use, other=-1)
    # A padded token's weights are 0, whatever its scores.
    in_use = in_use & (experts >= 0)
    grads = tl.load(grad_weights_ptr + of, mask=in_use, other=0) * scale
    if OVER_CHOSEN:
        shares = tl.load(weights_ptr + of, mask=in_use, other=0) / scale
        grads = shares * (grads - tl.sum(shares * grads, axis=1)[:, None])
    elif NORMALISE:
        chosen = tl.load(scores_ptr + row[:, None] * num_experts + experts, mask=in_use, other=0)
        total = (tl.sum(chosen, axis=1) + EPSILON)[:, None]
        grads = (grads - tl.sum(chosen * grads, axis=1)[:, None] / total) / total
    for k in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(choice == k, experts, 0), axis=1)[:, None]
        grad = tl.sum(tl.where(choice == k, grads, 0), axis=1)[:, None]
        if OVER_CHOSEN:
            grad_logits += tl.where(column == expert, grad, 0)
        else:
            grad_scores += tl.where(column == expert, grad, 0)

    if SCORES == "softmax":
        grad_logits += scores * (grad_scores - tl.sum(scores * grad_scores, axis=1)[:, None])
    elif SCORES == "sigmoid":
        grad_logits += scores * (1 - scores) * grad_scores
    else:
        # 1 - exp(-s^2), to the last digits too, is the sigmoid of the logit; where the root was cut off, nothing.
        squares = scores * scores
        rest = tl.exp(-squares)
        is_one = rest == 1
        sigmoid = tl.where(is_one, squares, (1 - rest) * squares / tl.where(is_one, 1, -tl.log(rest)))
        # Long before the exponential is 0 and its logarithm infinite, the sigmoid is 1.
        sigmoid = tl.where(squares > 32, 1, sigmoid)
        slope = sigmoid / (2 * tl.where(scores == 0, 1, scores))
        # By what is small: NaN is not.
        grad_logits += tl.where(squares <= TINY, 0, slope * grad_scores)
    tl.store(grad_ptr + at, grad_logits, mask=mask)
