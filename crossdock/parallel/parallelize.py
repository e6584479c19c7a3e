"""The order in which a model is made parallel, in one function."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from crossdock.parallel.compile import CompileConfig, apply_compile
from crossdock.parallel.context import apply_cp
from crossdock.parallel.expert import apply_ep
from crossdock.parallel.fsdp import apply_fsdp
from crossdock.parallel.mesh import Meshes, ParallelismConfig
from crossdock.parallel.recompute import ActivationCheckpointConfig, apply_activation_checkpoint
from crossdock.parallel.stages import apply_pp
from crossdock.parallel.tensor import TensorPlan, apply_tp

__all__ = ["parallelize"]


def parallelize(
    model: nn.Module,
    meshes: Meshes,
    config: ParallelismConfig | None = None,
    *,
    activation_checkpoint: ActivationCheckpointConfig | None = None,
    compile_config: CompileConfig | None = None,
    param_dtype: torch.dtype | None = None,
    blocks: list[nn.Module] | None = None,
    cpu_offload: bool = False,
    tokens_per_rank: int | None = None,
    tensor_plan: TensorPlan | None = None,
) -> nn.Module:
    """Make `model` parallel, in place; the order is below.

    Args:
        model: holds `crossdock.MoE` layers; on the meta device or initialised. The entries of its outermost
            `nn.ModuleList`s are taken for its transformer blocks. Where ranks share sequences, see `apply_cp`.
        meshes: from `ParallelDims.build_mesh`.
        config: schedule and stages of a pipeline, sequence parallelism, what FSDP frees after a forward pass; its
            degrees are those of `meshes`.
        activation_checkpoint: none by default.
        compile_config: not compiled by default.
        param_dtype: dtype of computation, see `apply_fsdp`.
        blocks: what FSDP gathers as a unit; by default the model's transformer blocks.
        cpu_offload: see `apply_fsdp`.
        tokens_per_rank: see `ExpertParallel`.
        tensor_plan: see `apply_tp`.
    """
    config = replace(config or ParallelismConfig(), pipeline_parallel_degree=meshes.size("pp"))
    apply_pp(model, meshes, config.pipeline_parallel_schedule, config.pipeline_parallel_stages_per_rank)
    apply_tp(model, meshes, tensor_plan, sequence_parallel=config.sequence_parallel)
    apply_cp(model, meshes)
    apply_ep(model, meshes, tokens_per_rank=tokens_per_rank, dtype=param_dtype)
    apply_compile(model, compile_config or CompileConfig())
    apply_activation_checkpoint(model, activation_checkpoint or ActivationCheckpointConfig())
    return apply_fsdp(
        model,
        meshes,
        param_dtype=param_dtype,
        blocks=blocks,
        reshard_after_forward=config.reshards,
        cpu_offload=cpu_offload,
    )
