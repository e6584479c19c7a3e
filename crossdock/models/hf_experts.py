"""What transformers' experts modules hold and compute, as ours: `gate_up_proj [E, 2I, H]` and all its variants."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from crossdock.experts import ACTIVATIONS, ActivationName, ExpertParams, ExpertsFormula, halves_apart

__all__ = ["UnknownExperts", "experts_formula", "experts_params", "is_experts"]

# transformers' modules to the names of ours.
_ACTIVATIONS: Mapping[type, ActivationName] = MappingProxyType(
    {
        nn.SiLU: "silu",
        nn.ReLU: "relu",
        type(ACT2FN["silu"]): "silu",
        type(ACT2FN["gelu"]): "gelu",
        type(ACT2FN["gelu_new"]): "gelu_tanh",
        type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
        type(ACT2FN["quick_gelu"]): "quick_gelu",
        type(ACT2FN["relu2"]): "relu_squared",
    }
)
_DECORATOR = "transformers.integrations.moe"
# What every module has that transformers' `use_experts_implementation` has decorated.
_LAYOUT = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


class UnknownExperts(ValueError):
    """Experts that ours would compute wrongly; the message is what they have, as in `name has ...`."""


def is_experts(module: nn.Module) -> bool:
    """Whether this is an experts module: called with tokens `[T, H]`, ids and weights `[T, K]`, of a known layout."""
    return all(name in vars(module) for name in _LAYOUT)


def experts_params(experts: nn.Module) -> ExpertParams:
    """The module's parameters as ours: views, but for interleaved ones, whose two halves are copied apart."""
    module: Any = experts
    first = "gate_up_proj" if module.has_gate else "up_proj"
    gate_up, down = getattr(module, first), module.down_proj
    if not module.is_transposed:
        # The products take either order in memory, and the gradients come back in the parameters' own.
        gate_up, down = gate_up.mT, down.mT
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in (first, "down_proj")]
    if not module.is_concatenated:
        gate_up = halves_apart(gate_up)
        biases[0] = None if biases[0] is None else halves_apart(biases[0])
    return ExpertParams(gate_up, down, *biases)


def experts_formula(experts: nn.Module) -> ExpertsFormula:
    """What these experts compute.

    A gating function of the module's own is looked at by its values.

    Raises:
        UnknownExperts: for what our backends would compute wrongly.
    """
    module: Any = experts
    reasons = ["a norm after each expert"] * bool(module.has_post_expert_norm)
    activation = getattr(module, "act_fn", None)
    # The gating function that most have is one of the decorator's.
    if module.has_gate and type(module)._apply_gate.__module__ != _DECORATOR:
        formula = _formula_of_gate(module)
        missing = "a gating function of its own"
    else:
        name = _ACTIVATIONS.get(type(activation)) or _name_of_values(activation)
        formula = None if name is None else ExpertsFormula(name, gated=module.has_gate)
        missing = f"the activation {getattr(activation, '__name__', type(activation).__name__)}"
    if formula is None or reasons:
        raise UnknownExperts(", ".join([*reasons, *([missing] if formula is None else [])]))
    return formula


@torch.no_grad()
def _formula_of_gate(module: Any) -> ExpertsFormula | None:
    """The formula that gives the values of the module's gating function; `None` where there is none.

    Numbers that the module holds (`limit`, `swiglu_limit`) are tried as clamps, which the probes exceed.
    """
    limits = {float(value) for value in vars(module).values() if type(value) in (int, float) and 0 < value < 1e6}
    most = 2 * max(limits, default=1.0) + 4
    gate, up = (torch.linspace(-most, most, 61, device="cpu").roll(shift) for shift in (0, 17))
    halves = torch.cat([gate, up]) if module.is_concatenated else torch.stack([gate, up], dim=-1).flatten()
    expected = _values(module._apply_gate, halves[None])
    for name in ACTIVATIONS:
        for limit in (None, *sorted(limits)):
            for up_offset in (0.0, 1.0):
                formula = ExpertsFormula(name, limit=limit, up_offset=up_offset)
                if _equal(formula.activate(gate, up)[None], expected):
                    return formula
    return None


@torch.no_grad()
def _name_of_values(activation: Any) -> ActivationName | None:
    """The activation that has the values of a function that is none of transformers' modules."""
    probe = torch.linspace(-8, 8, 61, device="cpu")
    expected = _values(activation, probe)
    return next((name for name, (function, _) in ACTIVATIONS.items() if _equal(function(probe), expected)), None)


def _values(function: Any, probe: Tensor) -> Tensor | None:
    """What a function gives; `None` where it is none of a single tensor."""
    try:
        return function(probe)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def _equal(ours: Tensor, theirs: Tensor | None) -> bool:
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    return torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-6)
