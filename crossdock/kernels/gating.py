"""What lies between an expert's two products, for kernels: `h = a(g) (u + offset)`, or `a(g)` ungated, and its slopes.

With gate `g` and up `u`, clamped first where there is a limit: `g <= limit`, `-limit <= u <= limit`. The activations
`a` are those of crossdock/experts/formula.py, by the same names; docs/semantics.md, "Experts". All values are fp32.
"""

from __future__ import annotations

from typing import NamedTuple

from crossdock.kernels.runtime import jit, tl

__all__ = ["Gating", "gated", "gated_slopes"]


class Gating(NamedTuple):
    """What a kernel must know of a formula; fields as in `ExpertsFormula` of crossdock/experts."""

    activation: str = "silu"
    gated: bool = True
    limit: float | None = None
    up_offset: float = 0.0

    def constants(self) -> dict[str, object]:
        """A kernel's constant arguments."""
        return {"ACTIVATION": self.activation, "LIMIT": self.limit, "OFFSET": self.up_offset, "GATED": self.gated}


@jit
def _activation(gate, ACTIVATION: tl.constexpr):
    """`a(g)` and `da/dg`."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        return value, sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "quick_gelu":
        sigmoid = tl.sigmoid(1.702 * gate)
        value = gate * sigmoid
        return value, sigmoid + 1.702 * value * (1 - sigmoid)
    elif ACTIVATION == "gelu":
        # The normal distribution's function, and its density: 1 / sqrt(2) and 1 / sqrt(2 pi).
        normal = 0.5 * (1 + tl.erf(0.7071067811865476 * gate))
        return gate * normal, normal + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "gelu_tanh":
        # `(1 + tanh(x)) / 2` is `s(2 x)`, of slope `2 s (1 - s)`; 0.797... is sqrt(2 / pi).
        sigmoid = tl.sigmoid(2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
        inner_slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
        return gate * sigmoid, sigmoid + gate * sigmoid * (1 - sigmoid) * inner_slope
    elif ACTIVATION == "relu":
        # By comparison: a maximum would drop NaN.
        return tl.where(gate < 0, 0, gate), tl.where(gate > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu_squared")
        positive = tl.where(gate < 0, 0, gate)
        return positive * positive, 2 * positive


@jit
def _clamped(gate, up, LIMIT: tl.constexpr):
    # By comparison: a minimum would drop NaN.
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up


@jit
def gated(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, GATED: tl.constexpr):
    """`h` of `gate` and `up`; ungated experts hand over the gate twice."""
    gate, up = _clamped(gate, up, LIMIT)
    value, _ = _activation(gate, ACTIVATION)
    if GATED:
        value *= up + OFFSET
    return value


@jit
def gated_slopes(
    gate_in, up_in, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, GATED: tl.constexpr
):
    """`h`, `dh/dgate` and `dh/dup` (ungated: of no meaning)."""
    gate, up = _clamped(gate_in, up_in, LIMIT)
    value, gate_slope = _activation(gate, ACTIVATION)
    up_slope = value
    if GATED:
        value *= up + OFFSET
        gate_slope *= up + OFFSET
    if LIMIT is not None:
        gate_slope = tl.where(gate_in > LIMIT, 0, gate_slope)
        up_slope = tl.where((up_in > LIMIT) | (up_in < -LIMIT), 0, up_slope)
    return value, gate_slope, up_slope
