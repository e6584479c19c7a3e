"""Parallelism: meshes, expert parallelism, activation checkpointing, FSDP, gradients."""

from crossdock.parallel.blocks import block_lists, plain_name, transformer_blocks
from crossdock.parallel.compile import CompileConfig, apply_compile
from crossdock.parallel.context import SequenceContext, apply_cp, check_heads
from crossdock.parallel.expert import ExpertParallel, apply_ep, layer_dispatcher
from crossdock.parallel.fsdp import apply_fsdp
from crossdock.parallel.gradients import GradientManager
from crossdock.parallel.groups import LOOPBACK, GroupPlace, GroupsFailed, OneGroup, ReplicaGroups
from crossdock.parallel.mesh import (
    ContextMethod,
    LayoutError,
    Meshes,
    ParallelDims,
    ParallelismConfig,
    PipelineSchedule,
    Reader,
    ReshardPolicy,
    nearest,
)
from crossdock.parallel.norm import clip_grad_norm_, global_grad_norm
from crossdock.parallel.parallelize import parallelize
from crossdock.parallel.pipeline import Boundary, Pipeline, check_microbatches
from crossdock.parallel.recompute import ActivationCheckpointConfig, apply_activation_checkpoint
from crossdock.parallel.replicas import ReplicaTraffic
from crossdock.parallel.shards import as_shard, as_shards, local_part, local_with_offsets
from crossdock.parallel.stages import Stages, apply_pp, cut_blocks, stages_of, stages_per_rank
from crossdock.parallel.tensor import Region, TensorPlan, apply_tp
from crossdock.parallel.vocabulary import VocabularyHead

__all__ = [
    "LOOPBACK",
    "ActivationCheckpointConfig",
    "Boundary",
    "CompileConfig",
    "ContextMethod",
    "ExpertParallel",
    "GradientManager",
    "GroupPlace",
    "GroupsFailed",
    "LayoutError",
    "Meshes",
    "OneGroup",
    "ParallelDims",
    "ParallelismConfig",
    "Pipeline",
    "PipelineSchedule",
    "Reader",
    "Region",
    "ReplicaGroups",
    "ReplicaTraffic",
    "ReshardPolicy",
    "SequenceContext",
    "Stages",
    "TensorPlan",
    "VocabularyHead",
    "apply_activation_checkpoint",
    "apply_compile",
    "apply_cp",
    "apply_ep",
    "apply_fsdp",
    "apply_pp",
    "apply_tp",
    "as_shard",
    "as_shards",
    "block_lists",
    "check_heads",
    "check_microbatches",
    "clip_grad_norm_",
    "cut_blocks",
    "global_grad_norm",
    "layer_dispatcher",
    "local_part",
    "local_with_offsets",
    "nearest",
    "parallelize",
    "plain_name",
    "stages_of",
    "stages_per_rank",
    "transformer_blocks",
]
