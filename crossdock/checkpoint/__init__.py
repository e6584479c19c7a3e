"""Checkpoints: any layout to any layout, and Hugging Face's format in and out."""

from crossdock.checkpoint.distributed import CheckpointConfig, Checkpointer
from crossdock.checkpoint.folders import (
    CHECKPOINT_FOLDER,
    CheckpointError,
    find_checkpoint,
    latest_step,
    read_counters,
    replace_folder,
    saved_world_size,
)
from crossdock.checkpoint.hf import DTYPES, HFCheckpoint, HFKeys, Part
from crossdock.checkpoint.hf_saving import save_hf
from crossdock.checkpoint.optimizer import materialise_optimizer_state

__all__ = [
    "CHECKPOINT_FOLDER",
    "DTYPES",
    "CheckpointConfig",
    "CheckpointError",
    "Checkpointer",
    "HFCheckpoint",
    "HFKeys",
    "Part",
    "find_checkpoint",
    "latest_step",
    "materialise_optimizer_state",
    "read_counters",
    "replace_folder",
    "save_hf",
    "saved_world_size",
]
