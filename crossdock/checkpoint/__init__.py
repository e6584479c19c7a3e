"""Checkpoints: any layout to any layout."""

from crossdock.checkpoint.distributed import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    latest_step,
    saved_world_size,
)

__all__ = ["CheckpointConfig", "CheckpointError", "Checkpointer", "latest_step", "saved_world_size"]
