"""Shared experts: a feed-forward layer that every token passes, beside the routed ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossdock.experts.formula import SWIGLU, ExpertsFormula

__all__ = ["SharedExperts"]


class SharedExperts(nn.Module):
    """`y = h(x) Wd`, `[T, H]`, times `sigmoid(x wg)` where there is a gate (Qwen2-MoE).

    Several shared experts of one size are one of their sizes' sum.

    Args:
        hidden_size: `H`.
        intermediate_size: of all of them together.
        gate: whether a learned gate `[1, H]` scales each token's output.
        formula: what it computes; `weight_on` has no meaning here.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, gate: bool = False, formula: ExpertsFormula = SWIGLU
    ) -> None:
        super().__init__()
        self.formula = formula
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False) if formula.gated else None
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, 1, bias=False) if gate else None

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal weights of deviation `std`."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, H] -> [T, H]` in its dtype; the activation in fp32 (float64 stays)."""
        gate, up = self.gate_proj(x), None if self.up_proj is None else self.up_proj(x)
        wide = torch.promote_types(gate.dtype, torch.float32)
        h = self.formula.activate(gate.to(wide), None if up is None else up.to(wide))
        y = self.down_proj(h.to(gate.dtype))
        return y if self.gate is None else self.gate(x).sigmoid() * y
