"""A run's weights in Hugging Face's format."""

from __future__ import annotations

from pathlib import Path

import torch

from crossdock.checkpoint import HFCheckpoint
from crossdock.config import ConfigError, check_writable
from crossdock.models import export_hf, left_out
from crossdock.tools.opening import ModelSource, open_model

__all__ = ["check_export", "export"]


def check_export(source: ModelSource, destination: Path) -> None:
    """Raises ConfigError where there is nothing to export, or no place for it."""
    if isinstance(source.weights, HFCheckpoint):
        raise ConfigError(
            "model", str(source.path), "is in Hugging Face's format; must be a run folder or a checkpoint"
        )
    if destination.exists():
        raise ConfigError("destination", str(destination), "exists; name another folder, or remove it")
    check_writable("destination", str(destination))


def export(source: ModelSource, destination: Path, device: torch.device, dtype: str, max_shard_bytes: int) -> str:
    """Write `source` to `destination`, see `export_hf`; says what is left out, see `left_out`. Collective.

    Raises:
        CheckpointError: on all ranks, where something could not be read or written.
    """
    model = open_model(source, device)
    export_hf(model, source.family.hf_keys, source.assets, destination, dtype, max_shard_bytes=max_shard_bytes)
    return left_out(model, source.family.hf_keys)
