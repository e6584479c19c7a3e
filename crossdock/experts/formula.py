"""What an expert computes between its two products (docs/semantics.md, "Experts")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "GPT_OSS",
    "QUICK_GELU_ALPHA",
    "SWIGLU",
    "ActivationName",
    "ExpertsFormula",
    "halves_apart",
    "halves_interleaved",
]

_aten = torch.ops.aten
QUICK_GELU_ALPHA = 1.702
"""`alpha` of `x sigmoid(alpha x)`, which is about GELU."""

ActivationName = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared"]
"""Of the gate of an expert."""


def _sigmoid_slope(gate: Tensor, alpha: float, value: Tensor, slope: Tensor) -> None:
    """`g s(a g)` and its derivative `s + a g s (1 - s)`, with one exponential for both."""
    torch.sigmoid(gate if alpha == 1 else gate * alpha, out=slope)
    torch.mul(gate, slope, out=value)
    # s + a v - a v s
    torch.addcmul(slope, value, slope, value=-alpha, out=slope).add_(value, alpha=alpha)


def _gelu_slope(gate: Tensor, approximate: str, value: Tensor, slope: Tensor) -> None:
    value.copy_(F.gelu(gate, approximate=approximate))
    slope.copy_(_aten.gelu_backward(torch.ones_like(gate), gate, approximate=approximate))


def _relu_slope(gate: Tensor, value: Tensor, slope: Tensor) -> None:
    torch.clamp(gate, min=0, out=value)
    slope.copy_(gate > 0)


def _relu_squared_slope(gate: Tensor, value: Tensor, slope: Tensor) -> None:
    torch.clamp(gate, min=0, out=slope)
    torch.mul(slope, slope, out=value)
    slope.mul_(2)


ACTIVATIONS: Mapping[ActivationName, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], None]]]
ACTIVATIONS = MappingProxyType(
    {
        "silu": (F.silu, lambda gate, value, slope: _sigmoid_slope(gate, 1.0, value, slope)),
        "gelu": (F.gelu, lambda gate, value, slope: _gelu_slope(gate, "none", value, slope)),
        "gelu_tanh": (
            lambda gate: F.gelu(gate, approximate="tanh"),
            lambda gate, value, slope: _gelu_slope(gate, "tanh", value, slope),
        ),
        "quick_gelu": (
            lambda gate: gate * torch.sigmoid(QUICK_GELU_ALPHA * gate),
            lambda gate, value, slope: _sigmoid_slope(gate, QUICK_GELU_ALPHA, value, slope),
        ),
        "relu": (F.relu, _relu_slope),
        "relu_squared": (lambda gate: F.relu(gate).square(), _relu_squared_slope),
    }
)
"""By name: the function of the gate, and one that writes its value and its derivative into two buffers."""


@dataclass(frozen=True)
class ExpertsFormula:
    """`expert(x) = h(x Wgu) Wd` with `h = activation(gate) * (up + up_offset)`, or `activation(gate)` ungated.

    Args:
        activation: of the gate; `gelu_tanh` is the approximation, `quick_gelu` is `g * sigmoid(1.702 g)`.
        gated: whether the first product has an up half.
        limit: clamps the gate from above and the up half on both sides before all else.
        up_offset: added to the up half.
        weight_on: the routing weight multiplies the expert's `output` (before the down projection, its bias included)
            or its `input` (Llama 4).
    """

    activation: ActivationName = "silu"
    gated: bool = True
    limit: float | None = None
    up_offset: float = 0.0
    weight_on: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; valid: {', '.join(ACTIVATIONS)}")
        if self.weight_on not in ("output", "input"):
            raise ValueError(f"weight_on {self.weight_on!r} is unknown; valid: output, input")
        if self.up_offset and not self.gated:
            raise ValueError(f"up_offset = {self.up_offset} needs gated experts")

    def width(self, intermediate_size: int) -> int:
        """Columns of the first product: `2I` for gated experts, else `I`."""
        return intermediate_size * (2 if self.gated else 1)

    def activate(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """The two halves of the first product, `[N, I]` in fp32 or float64 (no `up` if ungated), to `h [N, I]`."""
        function, _ = ACTIVATIONS[self.activation]
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit) if up is not None else None
        if up is None:
            return function(gate)
        return function(gate) * (up + self.up_offset if self.up_offset else up)

    def slopes(self, gate: Tensor, up: Tensor | None, value: Tensor, gate_slope: Tensor, up_slope: Tensor) -> None:
        """Write `h`, `dh/dgate` and (gated) `dh/dup`, each `[N, I]`, into the three buffers; no gradients."""
        _, function = ACTIVATIONS[self.activation]
        gate_in, up_in = gate, up
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit) if up is not None else None
        if up is None:
            function(gate, value, gate_slope)
        else:
            up = up + self.up_offset if self.up_offset else up
            function(gate, up_slope, gate_slope)
            torch.mul(up_slope, up, out=value)
            gate_slope.mul_(up)
        if self.limit is not None:
            gate_slope.mul_(gate_in <= self.limit)
            if up_in is not None:
                up_slope.mul_(up_in.abs() <= self.limit)

    def halves(self, pre_activation: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gate and up of `[N, 2I]`, or all of `[N, I]` and `None` for ungated experts."""
        if not self.gated:
            return pre_activation, None
        gate, up = pre_activation.chunk(2, dim=-1)
        return gate, up


def halves_apart(interleaved: Tensor) -> Tensor:
    """`[..., 2I]` with gate and up in turn to gate first, up after."""
    return torch.cat([interleaved[..., ::2], interleaved[..., 1::2]], dim=-1)


def halves_interleaved(apart: Tensor) -> Tensor:
    """The inverse of `halves_apart`."""
    return torch.stack(apart.chunk(2, dim=-1), dim=-1).flatten(-2)


SWIGLU = ExpertsFormula()
"""`silu(gate) * up`, the formula of most families."""
GPT_OSS = ExpertsFormula("quick_gelu", limit=7.0, up_offset=1.0)
"""That of gpt-oss: limited, and `up + 1`."""
