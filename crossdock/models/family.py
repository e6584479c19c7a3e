"""What a model family has to say about itself, and the settings that choose one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from crossdock.moe import MoEConfig

__all__ = ["DEEPEP_SUFFIX", "Family", "ModelConfig"]

DEEPEP_SUFFIX = "-deepep"


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: which model is trained."""

    name: str = "qwen3"
    """Model family."""
    flavor: str = ""
    """A named size of the family; a suffix `-deepep` chooses that dispatcher. Empty: config.json of hf_assets_path, or
    `debug` without one."""
    hf_assets_path: str = ""
    """Folder in Hugging Face's format with tokenizer and, where flavor is empty, config.json; no weights are read."""


class Family(Protocol):
    """An adapter for one Hugging Face model family. CONTRIBUTING.md says how to add one."""

    name: str
    flavors: Mapping[str, Mapping[str, Any]]
    """Sizes by name, as arguments of the family's configuration class."""
    model_type: str
    """`model_type` in the family's config.json."""

    def hf_config(self, flavor: str) -> PreTrainedConfig:
        """The configuration of a flavor."""
        ...

    def hf_config_from(self, folder: Path) -> PreTrainedConfig:
        """The configuration in `folder/config.json`."""
        ...

    def build(self, hf_config: PreTrainedConfig) -> PreTrainedModel:
        """The family's transformers model, on the current default device."""
        ...

    def adapt(self, model: PreTrainedModel, moe: MoEConfig, *, force_load_balance: bool = False) -> PreTrainedModel:
        """Replace the MoE blocks by `crossdock.MoE`, values kept, and norms by ones that keep float64; in place."""
        ...

    def reset_buffers(self, model: nn.Module) -> None:
        """Compute non-persistent buffers (rotary frequencies) again, after `to_empty`."""
        ...
