"""Padding that the routers know of, in models whose code hands an MoE block its tokens alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from crossdock.moe import moe_layers
from crossdock.parallel import transformer_blocks

__all__ = ["accept_padding_mask", "keep_padding_mask"]


def accept_padding_mask(model: nn.Module) -> None:
    """Let `model(..., padding_mask=mask)` reach the MoE layers; `mask` is `[B, S]` bool, true where there is padding.

    transformers hands keyword arguments that it does not know down to the transformer blocks. There a hook takes this
    one off and leaves it with the block's layers: in each forward pass of the block, so that recompute sees it again.
    """
    for block in transformer_blocks(model):
        layers = list(moe_layers(block).values())

        def hand_down(
            module: nn.Module, args: Any, kwargs: dict[str, Any], layers: list[Any] = layers
        ) -> tuple[Any, dict[str, Any]]:
            mask = kwargs.pop("padding_mask", None)
            for layer in layers:
                layer.padding_mask = mask
            return args, kwargs

        block.register_forward_pre_hook(hand_down, with_kwargs=True)


def keep_padding_mask(model: nn.Module) -> None:
    """`accept_padding_mask` for a model whose code may not hand down what it does not know.

    The mask stays with the model until its next forward pass, so that recompute before that sees it again.
    """
    held: dict[str, Any] = {}

    def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        held["mask"] = kwargs.pop("padding_mask", None)
        return args, kwargs

    model.register_forward_pre_hook(take, with_kwargs=True)
    for block in transformer_blocks(model):
        layers = list(moe_layers(block).values())

        def hand_down(module: nn.Module, args: Any, layers: list[Any] = layers) -> None:
            for layer in layers:
                layer.padding_mask = held["mask"]

        block.register_forward_pre_hook(hand_down)
