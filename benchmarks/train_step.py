"""A training step on two CPU processes: ours, transformers' own expert parallelism, and that with our plug-in.

    python -m benchmarks.train_step [--rounds 9] [--steps 2] [--shapes 1 2] [--dtypes float32 bfloat16] [--write]
    python -m benchmarks.train_step --layouts [...]

Each variant has two gloo processes of one thread of its own. They take turns, so that one variant runs at a time and
all see the same noise; a ratio is taken within a round. All start from one checkpoint and see the same batches with the
same optimizer (fused AdamW; no clipping, since torch's does not take transformers' mix of meshes). Their losses must
agree. Peak memory is the resident set's, from the first step on. All run in the environment of a user's own script;
`crossdock train` is ours again, in the environment that this command gives its ranks (`memory_settings`: huge pages,
freed memory kept).

With `--layouts`, ours on other layouts of the two processes, each beside `ep 2`: what a layout costs. All take the same
rows in a step, in two micro-batches where both processes share them. `by hand` is `ep 2` without what other layouts
need, `apply_ep`, `apply_fsdp` and `clip_grad_norm_` in a plain loop: that machinery shall cost nothing where it has
nothing to do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

from benchmarks.results_file import spread, write_results
from crossdock.train.host_memory import memory_settings

WORLD_SIZE = 2
BATCH, SEQ_LEN, VOCAB = 4, 512, 8192
WARM_UP_STEPS = 2
GOALS = {1: {"float32": 1.15, "bfloat16": 1.35}, 2: {"float32": 1.25, "bfloat16": 1.5}}
SHAPES: dict[int, dict[str, int]] = {
    1: {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256},
    2: {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 128},
}
BASE = "ep 2"
BY_HAND = "by hand"
LAYOUTS: dict[str, dict[str, Any]] = {
    BASE: {"ep": 2},
    BY_HAND: {"ep": 2},
    "pp 2, 1f1b": {"pp": 2},
    "pp 2, zbv": {"pp": 2, "schedule": "zbv"},
    "tp 2": {"tp": 2, "ep": 2},
    "cp 2": {"cp": 2, "ep": 2},
    "dp_replicate 2": {"dp_replicate": 2},
    "fsdp 2": {},
}
TUNED = "crossdock train"
VARIANTS = ("crossdock", TUNED, "transformers", "plug-in")
# Relative, of the loss after some steps: what another order of summation may do.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--shapes", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--layouts", action="store_true", help="ours on all layouts")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/train_step..._DATE.json")
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            # Layouts in pairs, since two processes take some 6 GB.
            pairs = [[BASE, layout] for layout in list(LAYOUTS)[1:]]
            peer, goal = (BASE, None) if arguments.layouts else ("transformers", GOALS[shape][dtype])
            for variants in pairs if arguments.layouts else [arguments.variants]:
                rows += compare(shape, dtype, variants, arguments.rounds, arguments.steps, peer, goal)
                if arguments.write:
                    name = "train_step_layouts" if arguments.layouts else "train_step"
                    print(write_results(name, ["torch", "transformers", "accelerate", "crossdock"], rows))
    return 0 if all(row.get("losses_agree", True) for row in rows) else 1


def compare(
    shape: int, dtype: str, variants: list[str], rounds: int, steps: int, peer: str, goal: float | None
) -> list[dict[str, Any]]:
    """Run all variants in turn; prints and returns a row for each, beside `peer` where that is one of them."""
    case = f"shape {shape}: {SHAPES[shape]}, {dtype}"
    print(f"\n{case}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder, "model"), shape)
        teams = {variant: Team(variant, Path(folder), dtype) for variant in variants}
        try:
            seconds: dict[str, list[float]] = {variant: [] for variant in variants}
            losses: dict[str, list[float]] = {
                variant: [loss for _, loss in team.steps(WARM_UP_STEPS)] for variant, team in teams.items()
            }
            for number in range(rounds):
                for variant in variants[number % len(variants) :] + variants[: number % len(variants)]:
                    results = teams[variant].steps(steps)
                    seconds[variant].append(sum(taken for taken, _ in results) / steps)
                    losses[variant] += [loss for _, loss in results]
            memory = {variant: team.peak_memory() for variant, team in teams.items()}
        finally:
            for team in teams.values():
                team.close()
    return report(case, peer, goal, dtype, seconds, losses, memory)


def report(
    case: str,
    peer: str,
    goal: float | None,
    dtype: str,
    seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
    memory: dict[str, float],
) -> list[dict[str, Any]]:
    rows = []
    tokens = BATCH * SEQ_LEN
    for variant, taken in seconds.items():
        rate = tokens / statistics.median(taken)
        row: dict[str, Any] = {"case": case, "variant": variant, "figure": round(rate, 1), "unit": "tokens/s per rank"}
        row["peak_memory_gib"] = round(memory[variant], 3)
        row["seconds_per_step"] = [round(seconds, 3) for seconds in taken]
        row["losses"] = [round(loss, 6) for loss in losses[variant]]
        line = f"{variant:>15}: {rate:8,.0f} tok/s/rank  {memory[variant]:.2f} GiB  last loss {losses[variant][-1]:.5f}"
        if variant != peer and peer in seconds:
            ratios = spread([theirs / ours for theirs, ours in zip(seconds[peer], taken, strict=True)])
            difference = max(
                abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses[variant], losses[peer], strict=True)
            )
            row |= {"peer": peer, "peer_figure": round(tokens / statistics.median(seconds[peer]), 1)}
            row |= {"ratio": ratios["median"], "spread": ratios, "goal": goal}
            row |= {"loss_difference": difference, "losses_agree": difference <= TOLERANCE[dtype]}
            if goal is not None:
                row["met"] = ratios["median"] >= goal and memory[variant] <= memory[peer] and row["losses_agree"]
            line += f"  ratio {ratios['median']:.3f} ({ratios['low']:.3f} to {ratios['high']:.3f})"
            line += f"  losses differ by {difference:.1e}"
            if not row["losses_agree"]:
                line += "  LOSSES DO NOT AGREE"
        print(line, flush=True)
        rows.append(row)
    return rows


def make_checkpoint(folder: Path, shape: int) -> None:
    """The model that all variants start from, in Hugging Face's format."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=SEQ_LEN,
        output_router_logits=False,
        **SHAPES[shape],  # type: ignore[arg-type]
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


class Team:
    """The two processes of a variant, which wait while others run."""

    def __init__(self, variant: str, folder: Path, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(variant, rank, folder, dtype, theirs), daemon=True)
            with environment(memory_settings() if variant == TUNED else {}):
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def steps(self, number: int) -> list[tuple[float, float]]:
        """Seconds (of the slower rank) and loss (of the global batch) of each of `number` further steps."""
        for pipe in self._pipes:
            pipe.send(number)
        results = [pipe.recv() for pipe in self._pipes]
        return [(max(seconds for seconds, _ in step), step[0][1]) for step in zip(*results, strict=True)]

    def peak_memory(self) -> float:
        """GiB, of the larger process."""
        for pipe in self._pipes:
            pipe.send(0)
        return max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=20)
            process.kill()


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Within it, new processes inherit `settings`."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(variant: str, rank: int, folder: Path, dtype: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/{variant}", rank=rank, world_size=WORLD_SIZE)
    build = _crossdock_step
    if variant in ("transformers", "plug-in"):
        build = _transformers_step
    elif variant in LAYOUTS:
        build = _layout_step
    step = build(folder / "model", dtype, variant)
    generators = [torch.Generator().manual_seed(each) for each in range(WORLD_SIZE)]
    pipe.send(None)
    peak_started = False
    while True:
        number = pipe.recv()
        if number is None:
            break
        if number == 0:
            lines = Path("/proc/self/status").read_text().splitlines()
            pipe.send(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20)
            continue
        if not peak_started:
            Path("/proc/self/clear_refs").write_text("5")
            peak_started = True
        results = []
        for _ in range(number):
            tokens = [torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1), generator=each) for each in generators]
            batches = [{"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()} for rows in tokens]
            dist.barrier()
            started = time.perf_counter()
            loss = step(batches)
            seconds = time.perf_counter() - started
            dist.all_reduce(loss)
            results.append((seconds, loss.item()))
        pipe.send(results)
    dist.barrier()
    dist.destroy_process_group()


Step = Callable[[list[dict[str, torch.Tensor]]], torch.Tensor]
"""Takes the batches of all ranks; returns this rank's share of the global loss."""


def _crossdock_step(folder: Path, dtype: str, variant: str) -> Step:
    """As the trainer does it."""
    from crossdock.checkpoint import HFCheckpoint
    from crossdock.models import FAMILIES, batch_loss, build_model, materialise
    from crossdock.moe import finish_step, set_batch_totals
    from crossdock.moe_config import MoEConfig
    from crossdock.parallel import ParallelDims, parallelize

    family = FAMILIES["qwen3"]
    weights = HFCheckpoint.open(folder)
    model = build_model(family, family.hf_config_from(folder), MoEConfig(), torch.float32)
    mesh = ParallelDims(WORLD_SIZE, ep=WORLD_SIZE).build_mesh("cpu")
    parallelize(model, mesh, param_dtype=torch.bfloat16 if dtype == "bfloat16" else None)
    materialise(family, model, torch.device("cpu"), weights=weights)
    model.train()
    optimizer = _optimizer(model)
    targets = WORLD_SIZE * BATCH * SEQ_LEN

    def step(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        set_batch_totals(model, WORLD_SIZE * BATCH, targets)
        loss = batch_loss(model, **batches[dist.get_rank()]) / targets
        loss.backward()
        optimizer.step()
        finish_step(model, dist.group.WORLD)
        optimizer.zero_grad()
        return loss.detach()

    return step


def _layout_step(folder: Path, dtype: str, variant: str) -> Step:
    """A layout, as the trainer does it; or `BASE` by hand."""
    from crossdock.checkpoint import HFCheckpoint
    from crossdock.models import FAMILIES, accept_context_parallel, batch_loss, build_model, materialise
    from crossdock.moe import finish_step, set_batch_totals
    from crossdock.moe_config import MoEConfig
    from crossdock.parallel import (
        Boundary,
        GradientManager,
        ParallelDims,
        ParallelismConfig,
        Pipeline,
        apply_ep,
        apply_fsdp,
        clip_grad_norm_,
        parallelize,
    )

    degrees = dict(LAYOUTS[variant])
    schedule = degrees.pop("schedule", "1f1b")
    family = FAMILIES["qwen3"]
    weights = HFCheckpoint.open(folder)
    model = build_model(family, family.hf_config_from(folder), MoEConfig(), torch.float32)
    dims = ParallelDims(WORLD_SIZE, **degrees)
    meshes, reader = dims.build_mesh("cpu"), dims.reader(dist.get_rank())
    param_dtype = torch.bfloat16 if dtype == "bfloat16" else None
    if variant == BY_HAND:
        apply_fsdp(apply_ep(model, meshes), meshes, param_dtype=param_dtype)
    else:
        if dims.cp > 1:
            accept_context_parallel(model)
        config = ParallelismConfig(pipeline_parallel_schedule=schedule)
        parallelize(model, meshes, config, param_dtype=param_dtype, tensor_plan=family.tensor_plan(model.config))
    materialise(family, model, torch.device("cpu"), weights=weights)
    model.train()
    optimizer = _optimizer(model)
    gradients = None if variant == BY_HAND else GradientManager(model, meshes)
    pipeline = None
    if dims.pp > 1:
        assert gradients is not None
        shape = (BATCH, SEQ_LEN, model.config.hidden_size)
        boundary = Boundary(shape, param_dtype or torch.float32, torch.device("cpu"))
        pipeline = Pipeline(
            model, meshes, gradients, batch_loss, boundary, schedule=schedule, num_microbatches=WORLD_SIZE
        )
    targets = WORLD_SIZE * BATCH * SEQ_LEN
    columns = slice(reader.section * SEQ_LEN // reader.sections, (reader.section + 1) * SEQ_LEN // reader.sections)

    def step(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        set_batch_totals(model, WORLD_SIZE * BATCH, targets)
        own = [batches[reader.rank]] if reader.degree > 1 else batches
        own = [{name: rows[:, columns] for name, rows in batch.items()} for batch in own]
        loss = torch.zeros((), dtype=torch.float64)
        if pipeline is not None:
            loss += pipeline.step(own, 1 / targets)
        for index, batch in enumerate(own if pipeline is None else ()):
            if gradients is not None:
                gradients.before_backward(is_last=index == len(own) - 1)
            share = batch_loss(model, **batch) / targets
            share.backward()
            loss += share.detach()
        if gradients is None:
            clip_grad_norm_(model.parameters(), 1.0)
        else:
            gradients.clip(1.0)
        optimizer.step()
        finish_step(model, dist.group.WORLD)
        optimizer.zero_grad()
        return loss

    return step


def _transformers_step(folder: Path, dtype: str, variant: str) -> Step:
    """transformers' own, or with the plug-in."""
    experts, dispatch = "grouped_mm", "all_to_all"
    if variant == "plug-in":
        import crossdock.integrations.transformers  # noqa: F401 (registers itself)

        experts, dispatch = "crossdock", "crossdock"
    config = DistributedConfig(
        fsdp_size=WORLD_SIZE,
        ep_size=WORLD_SIZE,
        ep_implementation=dispatch,
        fsdp_mixed_precision=dtype == "bfloat16",
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation=experts,
        distributed_config=config,
    )
    model.train()
    optimizer = _optimizer(model)

    def step(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        own = batches[dist.get_rank()]
        loss = model(**own, shift_labels=own["labels"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach() / WORLD_SIZE

    return step


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)


if __name__ == "__main__":
    sys.exit(main())
