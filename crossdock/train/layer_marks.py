"""Hooks by which a rank knows in which layer it is, forward and backward."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossdock.comm import Place
from crossdock.moe import moe_layers
from crossdock.parallel import plain_name
from crossdock.parallel.blocks import transformer_blocks

__all__ = ["mark_layers"]


def mark_layers(model: nn.Module, place: Place) -> None:
    """Have the blocks and MoE layers of `model` write to `place` when they begin. Once it is on its layout.

    Backward passes are seen where a gradient reaches a block's output. A compiled block is left as it is: of such, only
    what its MoE layer does is seen.
    """
    names = {
        module: plain_name(name).removesuffix("._checkpoint_wrapped_module") for name, module in model.named_modules()
    }
    for block in transformer_blocks(model):
        if all(module._compiled_call_impl is None for module in block.modules()):
            # Before FSDP's hooks, which wait for the block's parameters.
            _mark(block, place, names[block], "", after=("", ""), first=True)
    for layer in moe_layers(model).values():
        name = names[layer]
        begins = "dispatch" if layer.router is None else ""
        # The backward pass meets the parts in the opposite order, and begins with what `combine` does backward.
        _mark(layer, place, name, begins, after=(name, ""), backward=("combine", ""))
        if layer.router is not None:
            _mark(layer.router, place, name, "router", after=(name, "dispatch"), backward=("router", ""))
        _mark(layer.experts, place, name, "experts", after=(name, "combine"), backward=("experts", "dispatch"))


def _mark(
    module: nn.Module,
    place: Place,
    layer: str,
    part: str,
    *,
    after: tuple[str, str],
    backward: tuple[str, str] = ("", ""),
    first: bool = False,
) -> None:
    """Write `layer` and `part` when `module` begins to compute, and `after` when its forward pass is over.

    Args:
        backward: the parts that begin when gradients come to the module's output, and to its input.
        first: before the module's other hooks.
    """

    def write(layer: str, part: str, *_: Any) -> None:
        started = time.perf_counter()
        place.mark(layer, part)
        place.seconds += time.perf_counter() - started

    def when_gradient_comes(values: Any, part: str) -> None:
        started = time.perf_counter()
        tensors = [values] if isinstance(values, Tensor) else [v for v in values if isinstance(v, Tensor)]
        tensor = next((tensor for tensor in tensors if tensor.requires_grad), None)
        if tensor is not None:
            tensor.register_hook(partial(write, layer, part))
        place.seconds += time.perf_counter() - started

    def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
        write(layer, part)
        if any(backward):
            when_gradient_comes(args, backward[1])

    def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        write(*after)
        when_gradient_comes(output, backward[0])

    outside_of_graphs: Any = torch.compiler.disable
    module.register_forward_pre_hook(outside_of_graphs(begin), prepend=first)
    module.register_forward_hook(outside_of_graphs(end), prepend=first)
