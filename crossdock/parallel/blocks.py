"""Where a model's transformer blocks are, and what its parameters are called beneath wrappers."""

from __future__ import annotations

from torch import nn

__all__ = ["block_lists", "plain_name", "transformer_blocks"]

_CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost `nn.ModuleList`s that hold modules, not lists: by convention a model's transformer blocks."""
    if isinstance(model, nn.ModuleList) and not any(isinstance(entry, nn.ModuleList) for entry in model.children()):
        return [model]
    return [blocks for child in model.children() for blocks in block_lists(child)]


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The entries of `block_lists(model)`, in order."""
    return [block for blocks in block_lists(model) for block in blocks.children()]


def plain_name(name: str) -> str:
    """A parameter's name without the prefix that activation checkpointing adds."""
    return name.replace(_CHECKPOINT_PREFIX, "")
