"""Checkpoints: any layout to any layout."""

from crossdock.checkpoint.distributed import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    latest_step,
    read_counters,
)

__all__ = ["CheckpointConfig", "CheckpointError", "Checkpointer", "latest_step", "read_counters"]
