"""A run's weights in Hugging Face's format, or its adapter in PEFT's."""

from __future__ import annotations

from pathlib import Path

import torch

from crossdock.checkpoint import HFCheckpoint
from crossdock.config import ConfigError, check_writable
from crossdock.lora import merge_lora
from crossdock.models import export_hf, left_out, save_peft_adapter
from crossdock.tools.opening import ModelSource, open_model

__all__ = ["check_export", "export"]


def check_export(source: ModelSource, destination: Path, *, merge: bool = False) -> None:
    """Raises ConfigError where there is nothing to export, or no place for it."""
    if isinstance(source.weights, HFCheckpoint):
        raise ConfigError(
            "model", str(source.path), "is in Hugging Face's format; must be a run folder or a checkpoint"
        )
    if merge and not source.lora.rank:
        raise ConfigError("--merge", str(source.path), "needs a LoRA run; this one has no adapters")
    if destination.exists():
        raise ConfigError("destination", str(destination), "exists; name another folder, or remove it")
    check_writable("destination", str(destination))


def export(
    source: ModelSource,
    destination: Path,
    device: torch.device,
    dtype: str,
    max_shard_bytes: int,
    *,
    merge: bool = False,
) -> str:
    """Write `source` to `destination`, see `export_hf`; says what is left out, see `left_out`. Collective.

    Of a LoRA run that is its adapter, see `save_peft_adapter`; with `merge`, the weights with it.

    Raises:
        CheckpointError: on all ranks, where something could not be read or written.
    """
    model = open_model(source, device)
    if source.lora.rank and not merge:
        save_peft_adapter(model, source.family, source.lora, source.base_path, destination, dtype)
        return ""
    merge_lora(model)
    keys = source.family.keys(model)
    export_hf(model, keys, source.assets, destination, dtype, max_shard_bytes=max_shard_bytes)
    return left_out(model, keys)
