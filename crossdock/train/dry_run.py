"""A step of one rank of any layout, without values: the real model and layout, with fake tensors and a fake group."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from crossdock.balance import BalanceMonitor
from crossdock.checkpoint import materialise_optimizer_state
from crossdock.config import Config
from crossdock.dispatch import AllGatherDispatcher, Traffic
from crossdock.models import FAMILIES, batch_loss
from crossdock.moe import MoE, moe_layer_places, moe_layers, set_batch_totals, step_load
from crossdock.parallel import GradientManager, Meshes, OneGroup, ParallelDims, block_lists, transformer_blocks
from crossdock.tools.plan import DryRun, RankRoutes, StepCounter, assume_counts
from crossdock.train.dry_pipeline import pipeline_pass
from crossdock.train.metrics import traffic_metrics
from crossdock.train.optimizer import build_optimizer
from crossdock.train.preparing import lay_out, model_of, prepare_model

__all__ = ["dry_run", "group_names", "keep_blocks"]


def dry_run(
    config: Config, dims: ParallelDims, rank: int, routes: RankRoutes, blocks: Sequence[int] | None = None
) -> DryRun:
    """Take one step of `rank` of the layout. Nothing is computed; in this process, which must have no process group.

    Args:
        config: of the run, with `global_batch_size` as a number.
        dims: the layout; of any number of ranks.
        rank: whose step.
        routes: where a rank's tokens of one micro-batch go, assumed.
        blocks: numbers of the transformer blocks that the model shall have; all unless told.

    Returns:
        What was counted, sent by (operation, dimension of the layout); of groups within a dimension, by their names.

    Raises:
        RuntimeError: where there is a process group already.
        ValueError: for a dispatcher that there is no dry run of.
    """
    if dist.is_initialized():
        raise RuntimeError("a dry run makes a process group of its own, and this process has one already")
    quiet = logging.getLogger("crossdock.parallel.expert")
    level = quiet.level
    quiet.setLevel(logging.WARNING)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dims.world_size)
    try:
        with warnings.catch_warnings():
            # Whether two tensors are one is asked of their addresses; those of fake ones differ, as they should.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            return _step(config, dims, rank, routes, blocks)
    finally:
        dist.destroy_process_group()
        quiet.setLevel(level)


def _step(config: Config, dims: ParallelDims, rank: int, routes: RankRoutes, blocks: Sequence[int] | None) -> DryRun:
    meshes = dims.build_mesh("cpu")
    model = model_of(config, None if blocks is None else max(blocks) + 1)
    if blocks is not None:
        keep_blocks(model, blocks)
    prepare_model(model, config, meshes)
    lay_out(model, config, meshes)
    layers = list(moe_layers(model).values())
    for layer in layers:
        assume_counts(layer, routes.chunks(layer.dispatch_plan.overlap_chunks))
    counter = StepCounter(_routes_of_rows(layers, routes))
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        _materialise(config, model)
        dtype = torch.bfloat16 if config.training.dtype == "bfloat16" else None
        parallelism = config.parallelism
        gradients = GradientManager(
            model, meshes, reduction=parallelism.gradient_reduction, sparse=parallelism.sparse_replica_gradients
        )
        optimizer = build_optimizer(model, config.optimizer, dtype)
        materialise_optimizer_state(optimizer)
        model.train()
        counter.hold([*model.parameters(), *model.buffers()], "parameters")
        counter.hold(_state_tensors(optimizer), "optimizer state")
        _take(counter, config, dims, rank, model, meshes, gradients, optimizer)
        sent = [layer.dispatcher.traffic for layer in layers]
    names = group_names(meshes)
    counted = counter.counted()
    by_dimension = {(operation, names.get(group, group)): each for (operation, group), each in counted.sent.items()}
    return DryRun(
        counted._replace(sent=by_dimension),
        sum(int(each.within) for each in sent),
        sum(int(each.between) for each in sent),
        sum(int(each.metadata) for each in sent),
    )


def _take(
    counter: StepCounter,
    config: Config,
    dims: ParallelDims,
    rank: int,
    model: PreTrainedModel,
    meshes: Meshes,
    gradients: GradientManager,
    optimizer: torch.optim.Optimizer,
) -> None:
    """As `Stepper.take`, in the same order."""
    training = config.training
    reader = dims.reader(rank)
    micro_batches = training.global_batch_size // (training.local_batch_size * reader.degree)
    tokens = training.global_batch_size * training.seq_len
    stage = meshes.stage if dims.pp > 1 else dist.group.WORLD
    set_batch_totals(model, training.global_batch_size, tokens, stage, meshes.sequence)
    shape = (training.local_batch_size, training.seq_len // reader.sections)
    counter.begin()
    batches = [{name: torch.zeros(shape, dtype=torch.int64) for name in _inputs(config)} for _ in range(micro_batches)]
    with _marked_blocks(model, counter):
        if dims.pp > 1:
            pipeline_pass(counter, config, dims, model, meshes, gradients, batches, 1 / tokens)
        else:
            for index, batch in enumerate(batches):
                gradients.before_backward(is_last=index == len(batches) - 1)
                counter.enter("forward")
                share = batch_loss(model, **batch) / tokens
                counter.enter("backward")
                share.backward()
                del share
    counter.hold((p.grad for p in model.parameters() if p.grad is not None), "gradients")
    counter.enter("clip")
    norm = gradients.clip(training.max_norm)
    counter.enter("metrics")
    layers = list(moe_layers(model).values())
    losses = len(layers[0].coefficients.active()) if layers and isinstance(layers[0], MoE) else 0
    _gather_metrics(norm, 1 + losses)
    traffic_metrics(Traffic(), gradients.replica_traffic, torch.device("cpu"), OneGroup())
    load = step_load(model, dist.group.WORLD)
    if dims.ep > 1:
        decay = config.balance.load_decay
        BalanceMonitor(moe_layer_places(model), layers, dims.ep, 1, decay).gather(load)
    counter.enter("optimizer")
    optimizer.step()
    optimizer.zero_grad()


def _gather_metrics(norm: Tensor, num_losses: int) -> None:
    """The exchange of `gather_metrics`: losses, the norm and two numbers of memory, without reading any."""
    own = torch.stack([norm.double()] * (num_losses + 3))
    dist.all_gather([torch.empty_like(own) for _ in range(dist.get_world_size())], own)


def _inputs(config: Config) -> list[str]:
    names = ["input_ids", "labels"]
    return [*names, "position_ids"] if config.data.within_documents else names


def keep_blocks(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave the model so many of its transformer blocks alone, in place."""
    (blocks,) = block_lists(model)
    chosen = [blocks[index] for index in kept]
    text: Any = model.config.get_text_config()
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(types := getattr(text, name, None), list):
            setattr(text, name, [types[index] for index in kept])
    text.num_hidden_layers = len(kept)
    for name in list(blocks._modules):
        del blocks._modules[name]
    for index, block in enumerate(chosen):
        blocks.add_module(str(index), block)


def _materialise(config: Config, model: PreTrainedModel) -> None:
    """As `crossdock.models.materialise`, without values."""
    model.to_empty(device="cpu")
    model.tie_weights()
    FAMILIES[config.model.name].reset_buffers(model)
    for layer in moe_layers(model).values():
        layer.load.reset()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


@contextmanager
def _marked_blocks(model: nn.Module, counter: StepCounter) -> Iterator[None]:
    """Within it, the backward pass tells the counter which block it is in."""
    blocks = transformer_blocks(model)

    def mark(index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: counter.enter(f"backward of block {index}"))

    hooks = [
        block.register_forward_hook(lambda _, __, output, index=index: mark(index, output))
        for index, block in enumerate(blocks)
    ]

    def mark_embedding(output: Any) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: counter.enter("backward of embedding"))

    first = cast(nn.Module, model.get_input_embeddings())  # type: ignore[operator]
    hooks.append(first.register_forward_hook(lambda _, __, output: mark_embedding(output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _routes_of_rows(layers: Sequence[Any], routes: RankRoutes) -> Any:
    """Of so many rows that arrived, how many routes they hold for this rank."""
    if not layers or layers[0].ep_world_size == 1:
        return lambda rows, width: rows * width
    layer = layers[0]
    own = layer.ep_rank
    per_row = routes.routes[own] / max(routes.rows[own], 1)
    if isinstance(layer.dispatcher, AllGatherDispatcher):
        per_row = routes.routes[own] / routes.tokens
    return lambda rows, width: min(round(rows * per_row), rows * width)


def group_names(meshes: Meshes) -> dict[str, str]:
    """What a layout's groups of ranks are, by name."""
    names = {}
    for mesh in (meshes.dense, meshes.experts):
        for dim, name in enumerate(mesh.mesh_dim_names or ()):
            names[mesh.get_group(dim).group_name] = name
    for name in ("cp", "sequence", "stage"):
        if (group := getattr(meshes, name)) is not None:
            names.setdefault(group.group_name, name)
    names[cast(dist.ProcessGroup, dist.group.WORLD).group_name] = "world"
    return names
