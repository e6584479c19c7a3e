"""Checkpoints: any layout to any layout, and Hugging Face's format in and out."""

from crossdock.checkpoint.dcp_streaming import stream_checkpoint
from crossdock.checkpoint.dcp_tensors import (
    Convention,
    DCPTensors,
    Located,
    Place,
    checkpoint_as_hf,
    locate,
    our_rows,
)
from crossdock.checkpoint.distributed import CheckpointConfig, Checkpointer
from crossdock.checkpoint.folders import (
    CHECKPOINT_FOLDER,
    CheckpointError,
    find_checkpoint,
    holds_weights_alone,
    in_short,
    latest_step,
    read_counters,
    read_state,
    replace_folder,
    saved_steps,
    saved_world_size,
)
from crossdock.checkpoint.foreign import METADATA_FILE, open_foreign
from crossdock.checkpoint.hf import HFCheckpoint, HFKeys, Part, tensor_shapes, views_of
from crossdock.checkpoint.hf_files import DTYPES
from crossdock.checkpoint.hf_saving import save_hf
from crossdock.checkpoint.hf_streaming import stream_hf
from crossdock.checkpoint.hf_writing import MAX_SHARD_BYTES
from crossdock.checkpoint.memory_files import Manifest, MemoryFiles
from crossdock.checkpoint.optimizer import materialise_optimizer_state
from crossdock.checkpoint.pickles import pickle_refusal
from crossdock.checkpoint.recovery import FoundSnapshot, Snapshots
from crossdock.checkpoint.state_dicts import expert_range, from_hf, to_hf, validate_experts
from crossdock.checkpoint.stored import Reader, Stored

__all__ = [
    "CHECKPOINT_FOLDER",
    "DTYPES",
    "MAX_SHARD_BYTES",
    "METADATA_FILE",
    "CheckpointConfig",
    "CheckpointError",
    "Checkpointer",
    "Convention",
    "DCPTensors",
    "FoundSnapshot",
    "HFCheckpoint",
    "HFKeys",
    "Located",
    "Manifest",
    "MemoryFiles",
    "Part",
    "Place",
    "Reader",
    "Snapshots",
    "Stored",
    "checkpoint_as_hf",
    "expert_range",
    "find_checkpoint",
    "from_hf",
    "holds_weights_alone",
    "in_short",
    "latest_step",
    "locate",
    "materialise_optimizer_state",
    "open_foreign",
    "our_rows",
    "pickle_refusal",
    "read_counters",
    "read_state",
    "replace_folder",
    "save_hf",
    "saved_steps",
    "saved_world_size",
    "stream_checkpoint",
    "stream_hf",
    "tensor_shapes",
    "to_hf",
    "validate_experts",
    "views_of",
]
