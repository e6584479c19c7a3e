"""torch.compile of transformer blocks, with the MoE layers left to run as they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from crossdock.parallel.blocks import transformer_blocks

__all__ = ["CompileConfig", "apply_compile"]


@dataclass(frozen=True)
class CompileConfig:
    """`[compile]`: torch.compile."""

    enable: bool = False
    """Compile each transformer block, but for its MoE layer, whose shapes change with the routing."""
    backend: str = "inductor"
    """torch.compile's backend. `inductor` needs a C++ compiler on CPU."""


def apply_compile(model: nn.Module, config: CompileConfig) -> nn.Module:
    """Compile the transformer blocks of `model`, in place. After EP, before activation checkpointing and FSDP."""
    if not config.enable:
        return model
    for block in transformer_blocks(model):
        block.compile(backend=config.backend)
    return model
