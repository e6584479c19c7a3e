"""The experts' mathematics (SEMANTICS.md, "Experts") in float64 numpy, route by route, with gradients by hand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["ExpertsGradients", "experts_forward", "experts_gradients"]


class ExpertsGradients(NamedTuple):
    """Gradients in the shapes of the inputs: `tokens`, `weights` and both parameters."""

    tokens: np.ndarray
    weights: np.ndarray
    gate_and_up_projs: np.ndarray
    down_projs: np.ndarray


def _silu(gate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`silu(g) = g s(g)` and its derivative `s (1 + g (1 - s))`."""
    sigmoid = 1 / (1 + np.exp(-gate))
    return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))


def experts_forward(
    tokens: np.ndarray, slot_ids: np.ndarray, weights: np.ndarray, gate_and_up_projs: np.ndarray, down_projs: np.ndarray
) -> np.ndarray:
    """`y[u] = sum_k weights[u, k] * (silu(x Wg) * (x Wu)) Wd`, `[U, H]`; shapes as `ExpertsBackend`."""
    inner = down_projs.shape[1]
    y = np.zeros(tokens.shape)
    for u, k in zip(*np.nonzero(slot_ids >= 0), strict=True):
        slot = slot_ids[u, k]
        gate_and_up = tokens[u] @ gate_and_up_projs[slot]
        activation, _ = _silu(gate_and_up[:inner])
        y[u] += weights[u, k] * ((activation * gate_and_up[inner:]) @ down_projs[slot])
    return y


def experts_gradients(
    grad_y: np.ndarray,
    tokens: np.ndarray,
    slot_ids: np.ndarray,
    weights: np.ndarray,
    gate_and_up_projs: np.ndarray,
    down_projs: np.ndarray,
) -> ExpertsGradients:
    """Gradients of `sum(grad_y * y)`."""
    inner = down_projs.shape[1]
    grads = ExpertsGradients(
        *(np.zeros(array.shape) for array in (tokens, weights, gate_and_up_projs, down_projs)),
    )
    for u, k in zip(*np.nonzero(slot_ids >= 0), strict=True):
        slot, weight = slot_ids[u, k], weights[u, k]
        gate_and_up = tokens[u] @ gate_and_up_projs[slot]
        activation, slope = _silu(gate_and_up[:inner])
        up = gate_and_up[inner:]
        hidden = activation * up
        grad_hidden = down_projs[slot] @ grad_y[u]
        grads.weights[u, k] = hidden @ grad_hidden
        grads.down_projs[slot] += weight * np.outer(hidden, grad_y[u])
        grad_gate_and_up = weight * np.concatenate([grad_hidden * up * slope, grad_hidden * activation])
        grads.gate_and_up_projs[slot] += np.outer(tokens[u], grad_gate_and_up)
        grads.tokens[u] += gate_and_up_projs[slot] @ grad_gate_and_up
    return grads
