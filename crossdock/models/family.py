"""What a model family has to say about itself, and the settings that choose one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from crossdock.checkpoint import HFKeys
from crossdock.moe_config import MoEConfig

__all__ = ["DEEPEP_SUFFIX", "Family", "Kernels", "ModelConfig"]

DEEPEP_SUFFIX = "-deepep"

Kernels = Literal["none", "liger"]


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: which model is trained."""

    name: str = "qwen3"
    """Model family."""
    flavor: str = ""
    """A named size of the family; a suffix `-deepep` chooses that dispatcher. Empty: config.json of hf_assets_path, or
    `debug` without one."""
    hf_assets_path: str = ""
    """Folder in Hugging Face's format with tokenizer and, where flavor is empty, config.json. Its weights are read with
    checkpoint.initial_load_in_hf alone."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention, by transformers' names. `flash_attention_*` need their package and a GPU."""
    kernels: Kernels = "none"
    """`liger` computes norms and the loss with liger-kernel, which must be installed."""


class Family(Protocol):
    """An adapter for one Hugging Face model family. CONTRIBUTING.md says how to add one."""

    name: str
    flavors: Mapping[str, Mapping[str, Any]]
    """Sizes by name, as arguments of the family's configuration class."""
    model_type: str
    """`model_type` in the family's config.json."""
    hf_keys: HFKeys
    """How its checkpoints name their tensors."""

    def hf_config(self, flavor: str) -> PreTrainedConfig:
        """The configuration of a flavor."""
        ...

    def hf_config_from(self, folder: Path) -> PreTrainedConfig:
        """The configuration in `folder/config.json`."""
        ...

    def build(self, hf_config: PreTrainedConfig) -> PreTrainedModel:
        """The family's transformers model with the attention that its configuration names, on the default device."""
        ...

    def adapt(
        self, model: PreTrainedModel, moe: MoEConfig, *, kernels: Kernels = "none", force_load_balance: bool = False
    ) -> PreTrainedModel:
        """Replace, in place and values kept, the MoE blocks by `crossdock.MoE`, norms by ones that keep float64 (or by
        Liger's) and the output projection by a `LossHead`; let it take a `padding_mask`."""
        ...

    def reset_buffers(self, model: nn.Module) -> None:
        """Compute non-persistent buffers (rotary frequencies) again, after `to_empty`."""
        ...
