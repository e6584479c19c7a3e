"""The router's mathematics (docs/semantics.md, "Router", "Losses and bias") in float64 numpy, gradients by hand."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

__all__ = ["NumpyRouting", "dense_weights", "route", "route_gradients", "sequence_losses", "z_losses"]

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]


class NumpyRouting(NamedTuple):
    """`expert_ids [T, K]` (`-1` for padding), `weights [T, K]`, `scores [T, E]`, `logits [T, E]`."""

    expert_ids: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    logits: np.ndarray


def route(
    x: np.ndarray,
    weight: np.ndarray,
    top_k: int,
    score_function: ScoreFunction = "softmax",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    bias: np.ndarray | None = None,
    padding_mask: np.ndarray | None = None,
) -> NumpyRouting:
    """Route `x [T, H]` with the router's `weight [E, H]`; the higher selection score first."""
    logits = x.astype(np.float64) @ weight.astype(np.float64).T
    if score_function == "softmax":
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = exponentials / exponentials.sum(axis=1, keepdims=True)
    elif score_function == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.sqrt(np.log1p(np.exp(logits)))
    selection = scores if bias is None else scores + bias
    expert_ids = np.argsort(-selection, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, expert_ids, axis=1)
    if norm_topk_prob:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    weights = weights * routed_scaling_factor
    if padding_mask is not None:
        expert_ids = np.where(padding_mask[:, None], -1, expert_ids)
        weights = np.where(padding_mask[:, None], 0, weights)
    return NumpyRouting(expert_ids, weights, scores, logits)


def route_gradients(
    grad_weights: np.ndarray,
    routing: NumpyRouting,
    x: np.ndarray,
    weight: np.ndarray,
    score_function: ScoreFunction = "softmax",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of `x` and of the router's `weight` from the gradient of the routing weights `[T, K]`.

    With `w_k = f s_k / S`, `S = sum_j s_j`: `dL/ds_k = f (g_k - sum_j g_j s_j / S) / S`.
    Softmax: `dL/dz = p (g - g.p)`; sigmoid: `dL/dz = g s (1 - s)`; `sqrt(softplus)`: `dL/dz = g sigmoid(z) / (2 s)`.
    """
    real = routing.expert_ids >= 0
    ids = np.where(real, routing.expert_ids, 0)
    chosen = np.where(real, np.take_along_axis(routing.scores, ids, axis=1), 0)
    grad_chosen = np.where(real, grad_weights, 0) * routed_scaling_factor
    if norm_topk_prob:
        total = np.where(real.any(axis=1, keepdims=True), chosen.sum(axis=1, keepdims=True), 1)
        grad_chosen = (grad_chosen - (grad_chosen * chosen).sum(axis=1, keepdims=True) / total) / total
    grad_scores = np.zeros_like(routing.scores)
    rows, columns = np.nonzero(real)
    np.add.at(grad_scores, (rows, ids[rows, columns]), grad_chosen[rows, columns])
    if score_function == "softmax":
        grad_logits = routing.scores * (grad_scores - (grad_scores * routing.scores).sum(axis=1, keepdims=True))
    elif score_function == "sigmoid":
        grad_logits = grad_scores * routing.scores * (1 - routing.scores)
    else:
        grad_logits = grad_scores / (1 + np.exp(-routing.logits)) / (2 * routing.scores)
    return grad_logits @ weight, grad_logits.T @ x


def dense_weights(expert_ids: np.ndarray, weights: np.ndarray, num_experts: int) -> np.ndarray:
    """`[T, E]`: each expert's weight, whatever the order of a token's experts; `-1` is left out."""
    dense = np.zeros((len(expert_ids), num_experts))
    for token, (token_ids, token_weights) in enumerate(zip(expert_ids, weights, strict=True)):
        for expert, weight in zip(token_ids, token_weights, strict=True):
            if expert >= 0:
                dense[token, expert] += weight
    return dense


def sequence_losses(scores: np.ndarray, expert_ids: np.ndarray, padding_mask: np.ndarray) -> np.ndarray:
    """Switch loss of each sequence, `[B]`, by the definition, token by token.

    `L = E / (K T^2) * sum_e n_e * sum_t p_te` over the unpadded tokens, scores normalised over the experts first.

    Args:
        scores: `[B, S, E]`.
        expert_ids: `[B, S, K]`.
        padding_mask: `[B, S]`, true where a token is padding.
    """
    losses = []
    num_experts, top_k = scores.shape[-1], expert_ids.shape[-1]
    for sequence_scores, sequence_ids, padding in zip(scores, expert_ids, padding_mask, strict=True):
        counts, sums, tokens = np.zeros(num_experts), np.zeros(num_experts), 0
        for token_scores, token_ids, is_padding in zip(sequence_scores, sequence_ids, padding, strict=True):
            if is_padding:
                continue
            tokens += 1
            sums += token_scores / token_scores.sum()
            for expert in token_ids:
                counts[expert] += 1
        losses.append(num_experts / (top_k * tokens**2) * (counts @ sums) if tokens else 0.0)
    return np.array(losses)


def z_losses(logits: np.ndarray) -> np.ndarray:
    """`logsumexp(logits_t)^2` of each token, `[T]`."""
    largest = logits.max(axis=-1)
    return (largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))) ** 2
