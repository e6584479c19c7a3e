"""Which parameters of a model are matrices of its hidden layers, and how they hold them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from crossdock.experts import GroupedExperts, UnpackedExperts
from crossdock.parallel import transformer_blocks
from crossdock.routed_experts import RoutedExperts
from crossdock.routing import Router

__all__ = ["MatrixForm", "hidden_matrices", "router_parameters"]


class MatrixForm(NamedTuple):
    """How a parameter holds matrices, in its last two dimensions.

    Attributes:
        transposed: `[..., n_in, n_out]`, as our experts; else `[..., n_out, n_in]`, as `nn.Linear`.
        parts: matrices of one size that lie side by side along `n_out`, as an expert's gate and up projection.
    """

    transposed: bool = False
    parts: int = 1


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, MatrixForm]:
    """The trained matrices of a model's hidden layers, on any layout, in the order of `model.parameters()`.

    These are experts' matrices, and the weights of `nn.Linear` within the model's transformer blocks (the entries of
    its outermost `nn.ModuleList`s), those in experts that are modules included. Not: a weight that a module outside of
    the blocks has, too; one with a single row, as a shared expert's gate; routers; adapters. A matrix that a family has
    fused, as `kv_a_proj_with_mqa`, counts as the one that it is stored as.
    """
    forms: dict[Tensor, MatrixForm] = {}
    experts = [module for module in model.modules() if isinstance(module, GroupedExperts | UnpackedExperts)]
    inside = {module for part in (*transformer_blocks(model), *experts) for module in part.modules()}
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            forms[module.gate_and_up_projs] = MatrixForm(transposed=True, parts=2 if module.formula.gated else 1)
            forms[module.down_projs] = MatrixForm(transposed=True)
        elif isinstance(module, nn.Linear) and module in inside and min(module.weight.shape) > 1:
            forms[module.weight] = MatrixForm()
    others = _outside(model, inside) | router_parameters(model)
    return {p: forms[p] for p in model.parameters() if p in forms and p.requires_grad and p not in others}


def router_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Of our routers; and of those that families keep: what has a row for each expert beside `RoutedExperts`."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, Router):
            found.update(module.parameters())
        for child in module.children():
            if isinstance(child, RoutedExperts) and child.router is None:
                beside = set(module.parameters()) - set(child.parameters())
                found |= {parameter for parameter in beside if parameter.shape[:1] == (child.num_experts,)}
    return found


def _outside(model: nn.Module, inside: set[nn.Module]) -> set[nn.Parameter]:
    """Parameters that a module which is not `inside` has."""
    return {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
