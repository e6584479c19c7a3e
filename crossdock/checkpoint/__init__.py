"""Checkpoints: any layout to any layout, and Hugging Face's format in and out."""

from crossdock.checkpoint.checksums import (
    CHECKSUMS_FILE,
    UNCHECKED,
    checksum,
    folder_problem,
    parse_checked_json,
    to_checked_json,
    write_checksums,
)
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
from crossdock.checkpoint.finite import what_is_not_finite
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
from crossdock.checkpoint.found_snapshot import FoundSnapshot
from crossdock.checkpoint.hf import HFCheckpoint, HFKeys, Part, tensor_shapes, views_of
from crossdock.checkpoint.hf_files import DTYPES
from crossdock.checkpoint.hf_saving import save_hf
from crossdock.checkpoint.hf_streaming import stream_hf
from crossdock.checkpoint.hf_writing import MAX_SHARD_BYTES
from crossdock.checkpoint.memory_files import Manifest, MemoryFiles
from crossdock.checkpoint.optimizer import materialise_optimizer_state
from crossdock.checkpoint.pickles import pickle_refusal
from crossdock.checkpoint.recovery import Snapshots
from crossdock.checkpoint.state_dicts import expert_range, from_hf, to_hf, validate_experts
from crossdock.checkpoint.stored import Reader, Stored
from crossdock.checkpoint.verifying import newest_whole, verify_checkpoint

__all__ = [
    "CHECKPOINT_FOLDER",
    "CHECKSUMS_FILE",
    "DTYPES",
    "MAX_SHARD_BYTES",
    "METADATA_FILE",
    "UNCHECKED",
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
    "checksum",
    "expert_range",
    "find_checkpoint",
    "folder_problem",
    "from_hf",
    "holds_weights_alone",
    "in_short",
    "latest_step",
    "locate",
    "materialise_optimizer_state",
    "newest_whole",
    "open_foreign",
    "our_rows",
    "parse_checked_json",
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
    "to_checked_json",
    "to_hf",
    "validate_experts",
    "verify_checkpoint",
    "views_of",
    "what_is_not_finite",
    "write_checksums",
]
