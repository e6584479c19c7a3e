"""The experts' mathematics (docs/semantics.md, "Experts") in float64 numpy, route by route, with gradients by hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from crossdock.experts import SWIGLU, ExpertsFormula

__all__ = ["ExpertsGradients", "experts_forward", "experts_gradients"]


class ExpertsGradients(NamedTuple):
    """Gradients in the shapes of the inputs: `tokens`, `weights`, both parameters and, where there are any, biases."""

    tokens: np.ndarray
    weights: np.ndarray
    gate_and_up_projs: np.ndarray
    down_projs: np.ndarray
    gate_and_up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None


def _sigmoid(x: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """`x s(a x)` and its derivative `s (1 + a x (1 - s))`."""
    sigmoid = 1 / (1 + np.exp(-alpha * x))
    return x * sigmoid, sigmoid * (1 + alpha * x * (1 - sigmoid))


def _activation(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative."""
    match name:
        case "silu":
            return _sigmoid(x, 1)
        case "quick_gelu":
            return _sigmoid(x, 1.702)
        case "gelu":
            normal = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
            return x * normal, normal + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        case "gelu_tanh":
            scale = math.sqrt(2 / math.pi)
            tanh = np.tanh(scale * (x + 0.044715 * x**3))
            slope = scale * (1 + 3 * 0.044715 * x * x) * (1 - tanh**2)
            return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * slope
        case "relu":
            return np.maximum(x, 0), (x > 0).astype(float)
        case "relu_squared":
            return np.maximum(x, 0) ** 2, 2 * np.maximum(x, 0)
    raise ValueError(name)


def _hidden(formula: ExpertsFormula, pre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`h [I]` of the first product and `dh / dpre`: `[I]` ungated; gate's and up's, `[2, I]`, gated."""
    limit = formula.limit
    gate, up = np.split(pre, 2) if formula.gated else (pre, np.ones_like(pre))
    inside = np.ones_like(gate) if limit is None else (gate <= limit).astype(float)
    up_inside = np.ones_like(gate) if limit is None else (np.abs(up) <= limit).astype(float)
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    value, slope = _activation(formula.activation, gate)
    if not formula.gated:
        return value, slope * inside
    up = up + formula.up_offset
    return value * up, np.stack([slope * inside * up, value * up_inside])


def _first_product(
    x: np.ndarray, slot: np.ndarray, gate_and_up_projs: np.ndarray, gate_and_up_bias: np.ndarray | None
) -> np.ndarray:
    pre = x @ gate_and_up_projs[slot]
    return pre if gate_and_up_bias is None else pre + gate_and_up_bias[slot]


def experts_forward(
    tokens: np.ndarray,
    slot_ids: np.ndarray,
    weights: np.ndarray,
    gate_and_up_projs: np.ndarray,
    down_projs: np.ndarray,
    gate_and_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
    formula: ExpertsFormula = SWIGLU,
) -> np.ndarray:
    """`y[u] = sum_k weights[u, k] * expert(x)` or `expert(weights[u, k] * x)`, `[U, H]`; shapes as `ExpertsBackend`."""
    y = np.zeros(tokens.shape)
    for u, k in zip(*np.nonzero(slot_ids >= 0), strict=True):
        slot, weight = slot_ids[u, k], weights[u, k]
        before, after = (weight, 1.0) if formula.weight_on == "input" else (1.0, weight)
        pre = _first_product(before * tokens[u], slot, gate_and_up_projs, gate_and_up_bias)
        out = _hidden(formula, pre)[0] @ down_projs[slot]
        y[u] += after * (out if down_bias is None else out + down_bias[slot])
    return y


def experts_gradients(
    grad_y: np.ndarray,
    tokens: np.ndarray,
    slot_ids: np.ndarray,
    weights: np.ndarray,
    gate_and_up_projs: np.ndarray,
    down_projs: np.ndarray,
    gate_and_up_bias: np.ndarray | None = None,
    down_bias: np.ndarray | None = None,
    formula: ExpertsFormula = SWIGLU,
) -> ExpertsGradients:
    """Gradients of `sum(grad_y * y)`."""
    inputs = (tokens, weights, gate_and_up_projs, down_projs, gate_and_up_bias, down_bias)
    grads = ExpertsGradients(*(None if array is None else np.zeros(array.shape) for array in inputs))  # type: ignore[arg-type]
    for u, k in zip(*np.nonzero(slot_ids >= 0), strict=True):
        slot, weight = slot_ids[u, k], weights[u, k]
        before, after = (weight, 1.0) if formula.weight_on == "input" else (1.0, weight)
        pre = _first_product(before * tokens[u], slot, gate_and_up_projs, gate_and_up_bias)
        hidden, slope = _hidden(formula, pre)
        out = hidden @ down_projs[slot] + (0 if down_bias is None else down_bias[slot])
        grad_out = after * grad_y[u]
        grads.down_projs[slot] += np.outer(hidden, grad_out)
        if grads.down_bias is not None:
            grads.down_bias[slot] += grad_out
        grad_pre = (slope * (down_projs[slot] @ grad_out)).reshape(-1)
        if grads.gate_and_up_bias is not None:
            grads.gate_and_up_bias[slot] += grad_pre
        grads.gate_and_up_projs[slot] += np.outer(before * tokens[u], grad_pre)
        grad_x = gate_and_up_projs[slot] @ grad_pre
        grads.tokens[u] += before * grad_x
        grads.weights[u, k] += grad_x @ tokens[u] if formula.weight_on == "input" else out @ grad_y[u]
    return grads
