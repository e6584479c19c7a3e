"""Checkpoints: any layout to any layout, and Hugging Face's format in and out."""

from crossdock.checkpoint.distributed import CheckpointConfig, Checkpointer
from crossdock.checkpoint.folders import (
    CHECKPOINT_FOLDER,
    CheckpointError,
    find_checkpoint,
    latest_step,
    read_counters,
    replace_folder,
    saved_steps,
    saved_world_size,
)
from crossdock.checkpoint.hf import HFCheckpoint, HFKeys, Part, tensor_shapes
from crossdock.checkpoint.hf_files import DTYPES
from crossdock.checkpoint.hf_saving import save_hf
from crossdock.checkpoint.hf_writing import MAX_SHARD_BYTES
from crossdock.checkpoint.optimizer import materialise_optimizer_state
from crossdock.checkpoint.state_dicts import expert_range, from_hf, to_hf, validate_experts

__all__ = [
    "CHECKPOINT_FOLDER",
    "DTYPES",
    "MAX_SHARD_BYTES",
    "CheckpointConfig",
    "CheckpointError",
    "Checkpointer",
    "HFCheckpoint",
    "HFKeys",
    "Part",
    "expert_range",
    "find_checkpoint",
    "from_hf",
    "latest_step",
    "materialise_optimizer_state",
    "read_counters",
    "replace_folder",
    "save_hf",
    "saved_steps",
    "saved_world_size",
    "tensor_shapes",
    "to_hf",
    "validate_experts",
]
