"""Runs of the trainer whose steps are counted, beside dry runs of the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from crossdock.config import Config, load_config, validate, with_settled_batch
from crossdock.moe import moe_layers
from crossdock.parallel import ParallelDims
from crossdock.tools.plan import Counted, DryRun, StepCounter, plan_model, read_model, read_skew
from crossdock.train.dry_run import dry_run, group_names
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer
from tests.tiny import speeches

DIMENSIONS = frozenset(
    ["pp", "dp_replicate", "fsdp", "tp", "ep_replicate", "ep_shard", "ep", "cp", "sequence", "stage", "world"]
)
# Activations that weigh as much as parameters, or more; routing that is the same in both runs.
SIZES = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def settings(assets: str, cache: str, run_folder: str = "", overrides: Sequence[str] = ()) -> list[str]:
    return [
        *(("--job.dump-folder", run_folder) if run_folder else ()),
        *("--model.hf-assets-path", assets),
        *("--data.source", str(speeches(assets)), "--data.cache-folder", cache),
        *("--training.seq-len", "64", "--training.steps", "2", "--training.local-batch-size", "2"),
        *("--lr-scheduler.warmup-steps", "1", "--training.tuned", "off"),
        *("--training.debug-moe-force-load-balance",),
        *overrides,
    ]


def layout_of(arguments: Sequence[str], world_size: int) -> tuple[Config, ParallelDims]:
    config = load_config(None, list(arguments))
    dims = validate(config, world_size)
    return with_settled_batch(config, dims), dims


def sent_by_dimension(counted: Counted, names: Mapping[str, str] = MappingProxyType({})) -> dict[str, int]:
    """Bytes sent by operation and dimension of the layout; of groups within one, by their ranks."""
    sent: dict[str, int] = defaultdict(int)
    for (operation, group), each in counted.sent.items():
        name = names.get(group, group)
        sent[f"{operation} {name if name in DIMENSIONS else each.ranks}"] += each.total
    return dict(sent)


def counted_run(assets: str, cache: str, run_folder: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Of this rank in the last step of a real run: the peak in bytes, bytes sent, and what dispatchers say of it."""
    config, dims = layout_of(settings(assets, cache, run_folder, overrides), dist.get_world_size())
    trainer = Trainer(config, dims, torch.device("cpu"), dist.get_rank() == 0, StopSignal())
    take = trainer.stepper.take
    steps: list[tuple[Counted, int, int, int]] = []

    # One for all steps: what FSDP allocates anew in each, the first one has made.
    counter = StepCounter()

    def counted(*arguments: Any) -> Any:
        layers = list(moe_layers(trainer.model).values())
        before = [layer.dispatcher.traffic for layer in layers]
        with counter:
            counter.hold([*trainer.model.parameters(), *trainer.model.buffers()], "parameters")
            state = [value for each in trainer.optimizer.state.values() for value in each.values()]
            counter.hold([value for value in state if isinstance(value, torch.Tensor)], "optimizer state")
            counter.begin()
            taken = take(*arguments)
            result = counter.counted()
        more = [layer.dispatcher.traffic - old for layer, old in zip(layers, before, strict=True)]
        within, between, metadata = (sum(getattr(m, n) for m in more) for n in ("within", "between", "metadata"))
        steps.append((result, within, between, metadata))
        return taken

    trainer.stepper.take = counted  # type: ignore[method-assign]
    trainer.train()
    # In the first step a pipeline sends a value beforehand, for NCCL's sake.
    result, within, between, metadata = steps[-1]
    names = group_names(trainer.meshes)
    return {
        "peak": result.peak,
        "sent": sent_by_dimension(result, names),
        "traffic": (within, between, metadata),
    }


def predicted(
    assets: str, cache: str, overrides: Sequence[str], world_size: int, rank: int, blocks: Sequence[int] | None = None
) -> DryRun:
    """The dry run of the same."""
    config, dims = layout_of(settings(assets, cache, overrides=overrides), world_size)
    facts = read_model(plan_model(config))
    tokens = config.training.local_batch_size * config.training.seq_len // (dims.cp * dims.tp)
    routes = read_skew("uniform", config, facts).of_ranks(tokens, dims.ep, facts)
    return dry_run(config, dims, rank, routes, blocks)


def cache_beside(assets: Path) -> str:
    return str(assets.parent / "cache")
