"""LoRA: small trained matrices beside frozen weights (arXiv 2106.09685), in a model's attention and in its experts.

A weight `W [n_out, n_in]` acts as `W + alpha / r * B A`. Adapters are parameters of the modules that hold the weights,
so that these keep their names: `q_proj.weight`, `q_proj.lora_a [r, n_in]`, `q_proj.lora_b [n_out, r]`; of experts, see
`crossdock.experts.ExpertAdapters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from crossdock.experts import GroupedExperts

__all__ = ["LoRAConfig", "LoRAError", "LoRALinear", "adapters_of", "add_lora", "base_of", "merge_lora"]


@dataclass(frozen=True)
class LoRAConfig:
    """`[lora]`: train low-rank adapters and leave the weights as they are (LoRA)."""

    rank: int = 0
    """Of the adapters; 0 is no LoRA: the weights themselves are trained."""
    alpha: float = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: tuple[Literal["attention", "experts"], ...] = ("attention", "experts")
    """What gets adapters: the linear layers of attention, the experts' matrices, or both."""
    adapter_path: str = ""
    """A new run starts from this adapter, a folder in PEFT's format; empty: from one that changes nothing."""


class LoRAError(ValueError):
    """Adapters that a model cannot have. `field` is the `[lora]` key, `value` what it holds, `valid` what would do."""

    def __init__(self, field: str, value: object, valid: str) -> None:
        super().__init__(field, value, valid)
        self.field, self.value, self.valid = field, value, valid

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.valid}"


class LoRALinear(nn.Linear):
    """`y = x W^T + b + alpha / r * (x A^T) B^T`, `[..., n_in] -> [..., n_out]`.

    Args:
        linear: whose parameters it takes.
        rank: `r`.
        alpha: as in the formula.

    Attributes:
        lora_a, lora_b: `A [r, n_in]` of deviation `1 / sqrt(3 n_in)`, and `B [n_out, r]`, which begins as 0.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_scale = alpha / rank
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.normal_(self.lora_a, std=(3 * linear.in_features) ** -0.5)

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return super().forward(input) + self.lora_scale * low


def add_lora(model: nn.Module, config: LoRAConfig, attention: Sequence[str] = ("self_attn",)) -> nn.Module:
    """Freeze `model` and give it adapters, in place; before it is made parallel.

    Args:
        model: with `crossdock.MoE` layers; on the meta device or initialised, its function is as it was.
        config: of `rank` 1 or more.
        attention: names of the modules whose `nn.Linear` layers are attention's.

    Raises:
        LoRAError: for a target that the model has not.
        ValueError: for a model that is parallel or has adapters already.
    """
    if adapters_of(model) or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("add_lora needs a model without adapters that is not parallel yet")
    wanted = set(config.targets)
    linear: list[tuple[str, nn.Linear]] = []
    experts: list[GroupedExperts] = []
    for path, module in model.named_modules():
        if isinstance(module, GroupedExperts) and "experts" in wanted:
            experts.append(module)
        elif type(module) is nn.Linear and "attention" in wanted and not {*path.split(".")}.isdisjoint(attention):
            linear.append((path, module))
    for target, found in (("attention", linear), ("experts", experts)):
        if target in wanted and not found:
            raise LoRAError("targets", config.targets, f"the model has no layer that is {target!r}")
    model.requires_grad_(False)
    for module in experts:
        module.add_lora(config.rank, config.alpha)
    for path, module in linear:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoRALinear(module, config.rank, config.alpha))
    return model


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters of `model`, on any layout, by the names that `named_parameters` has; empty without LoRA."""
    adapters: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            adapters |= {module.lora_a, module.lora_b}
        elif isinstance(module, GroupedExperts):
            adapters.update(module.adapters() or ())  # type: ignore[arg-type]
    return {name: parameter for name, parameter in model.named_parameters() if parameter in adapters}


def base_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of `model` but the adapters, by the names that `named_parameters` has."""
    adapters = adapters_of(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in adapters}


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Add the adapters to the weights beside them, in place, on any layout; they have no effect of their own any more.

    The sum is rounded to the weights' dtype. Collective where the model is sharded.
    """
    # First of all, since it makes FSDP shard again what a forward pass has left gathered.
    model.state_dict()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            # Rows of the weight and of `B` are sharded alike.
            _add_product(module.weight, module.lora_scale, _local(module.lora_b), _whole(module.lora_a))
            _local(module.lora_b).zero_()
        elif isinstance(module, GroupedExperts) and (adapters := module.adapters()) is not None:
            scale = module.lora_scale or 0.0
            first_a, first_b, down_a, down_b = adapters
            for weight, a, b in ((module.gate_and_up_projs, first_a, first_b), (module.down_projs, down_a, down_b)):
                _add_product(weight, scale, _local(a), _own_slots(b).mT)
                _local(b).zero_()
    return model


def _add_product(weight: Tensor, scale: float, left: Tensor, right: Tensor) -> None:
    local = _local(weight)
    wide = torch.promote_types(local.dtype, torch.float32)
    local.copy_(local.to(wide) + scale * (left.to(wide) @ right.to(wide)))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _own_slots(adapter: Tensor) -> Tensor:
    """An experts' adapter `[P/R, n, r]`, of this rank's slots, whole."""
    if not isinstance(adapter, DTensor):
        return adapter
    placements = [Replicate() if placement == Shard(1) else placement for placement in adapter.placements]
    return adapter.redistribute(placements=placements).to_local()
