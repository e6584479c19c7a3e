"""Checkpoints of a 2 GB model on two CPU processes, beside transformers' own distributed loading and saving.

    python -m benchmarks.checkpoint [--rounds 5] [--size-mb 2048] [--parts peer async] [--folder FOLDER] [--write]

Both sides have two gloo processes of one thread each and hold the same model at `ep = 2`, `fsdp = 2`; they take turns,
so that one runs at a time, and a ratio is taken within a round, of the slower process' time:

- HF load: from a folder in Hugging Face's format to a model on its layout; `from_pretrained(distributed_config=...)`.
- HF save: into such a folder; `save_pretrained`. Neither side waits for the disk.
- DCP save: a run's checkpoint, weights alone; `save_pretrained(distributed_checkpoint=True)`. Both wait for the disk.
- DCP load: from that to a model on its layout; `from_pretrained` of it.

Peak memory is anonymous memory (RssAnon: pages of a mapped file do not count) of the larger process, while a case runs.
Weights are equal, bit for bit, to those of the first folder: after each load they are saved and files compared.

Then ours alone: how long a checkpoint that is written in the background blocks a step, beside a blocking one and a
plain copy of the same tensors into memory that was there before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from benchmarks.results_file import result_row, spread, write_results

WORLD_SIZE = 2
OURS, PEER = "crossdock", "transformers"
CASES = ("HF load", "HF save", "DCP save", "DCP load")
SLOWEST = 1.0
BLOCKED_SHARE, BLOCKED_COPIES = 0.25, 1.5
# Of the peer's peak memory: what an allocator may keep, more or less.
MEMORY_NOISE = 1.02
HIDDEN, LAYERS, EXPERTS, VOCAB = 768, 8, 64, 4096


class Taken(NamedTuple):
    """What a case took: seconds of the slower process, GiB of the larger one."""

    seconds: float
    gib: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mb", type=int, default=2048, help="of the model in float32")
    parser.add_argument("--parts", nargs="+", choices=("peer", "async"), default=["peer", "async"])
    parser.add_argument("--folder", type=Path, help="where files are written (the system's for temporary files)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/checkpoint_DATE.json")
    arguments = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        size = make_model(folder / "model", arguments.size_mb)
        rows = compare(folder, size, arguments.rounds) if "peer" in arguments.parts else []
        if "async" in arguments.parts:
            rows += measure_async(folder, size, arguments.rounds)
    if arguments.write:
        print(write_results("checkpoint", ["torch", "transformers", "accelerate", "safetensors", "crossdock"], rows))
    return 0 if all(row["results_agree"] for row in rows) else 1


def make_model(folder: Path, size_mb: int) -> str:
    """Write the model that all start from, in files of at most 500 MB; says how large it is."""
    outside_experts = 2 * VOCAB * HIDDEN + LAYERS * HIDDEN * (HIDDEN + 4 * 64) * 2
    per_inner = LAYERS * EXPERTS * 3 * HIDDEN
    inner = max(8, round((size_mb * 2**18 - outside_experts) / per_inner / 8) * 8)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        moe_intermediate_size=inner,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")
    return f"{sum(parameter.nbytes for parameter in model.parameters()) / 2**20:,.0f} MiB"


def compare(folder: Path, size: str, rounds: int) -> list[dict[str, Any]]:
    """All cases of both sides in turn; prints and returns a row for each case."""
    print(f"{size}, {rounds} rounds of {OURS} and {PEER}", flush=True)
    teams = {side: Team(side, folder) for side in (OURS, PEER)}
    taken: dict[str, dict[str, list[Taken]]] = {case: {side: [] for side in teams} for case in CASES}
    agree = dict.fromkeys(CASES, True)
    try:
        for number in range(rounds):
            for case in CASES:
                for side in sorted(teams, reverse=number % 2 == 1):
                    taken[case][side].append(teams[side].run(case))
                    if case.endswith("load") and number == 0:
                        agree[case] &= teams[side].loaded_is(folder / "model")
            for side in teams:
                agree["HF save"] &= number > 0 or same_weights(folder / "model", folder / f"{side} HF")
    finally:
        for team in teams.values():
            team.close()
    # Its files are right where a load from them is.
    agree["DCP save"] = agree["DCP load"]
    return [report(f"{case}, {size}", taken[case][OURS], taken[case][PEER], agree[case]) for case in CASES]


def report(case: str, ours: list[Taken], theirs: list[Taken], agree: bool) -> dict[str, Any]:
    seconds, peer_seconds = [t.seconds for t in ours], [t.seconds for t in theirs]
    ratios = spread([mine / yours for mine, yours in zip(seconds, peer_seconds, strict=True)])
    row = result_row(case, "s", seconds, PEER, peer_seconds, ratios, agree=agree, goal=SLOWEST, at_most=True)
    gib, peer_gib = (max(t.gib for t in every) for every in (ours, theirs))
    row |= {"peak_anonymous_gib": round(gib, 3), "peer_peak_anonymous_gib": round(peer_gib, 3)}
    row["met"] = row["met"] and gib <= peer_gib * MEMORY_NOISE
    print(
        f"{case:>24}: {row['figure']:6.2f} s, {PEER} {row['peer_figure']:6.2f} s  ratio {ratios['median']:.3f} "
        f"({ratios['low']:.3f} to {ratios['high']:.3f})  peak {gib:.2f} GiB, {peer_gib:.2f} GiB"
        f"{'' if agree else '  WEIGHTS DIFFER'}",
        flush=True,
    )
    return row


def measure_async(folder: Path, size: str, rounds: int) -> list[dict[str, Any]]:
    """How long ours blocks a step: in the background, blocking, and a plain copy; prints and returns two rows."""
    team = Team(OURS, folder)
    kinds = ("background save", "blocking save", "plain copy")
    taken: dict[str, list[Taken]] = {kind: [] for kind in kinds}
    try:
        team.run("HF load")
        for kind in kinds[::2]:
            team.run(kind)  # takes the memory that is kept
        for _ in range(rounds):
            for kind in kinds:
                taken[kind].append(team.run(kind))
        agree = team.loaded_is(folder / "model")
    finally:
        team.close()
    seconds = {kind: [t.seconds for t in taken[kind]] for kind in kinds}
    rows = []
    for peer, goal in (("blocking save", BLOCKED_SHARE), ("plain copy", BLOCKED_COPIES)):
        ratios = spread([ours / theirs for ours, theirs in zip(seconds[kinds[0]], seconds[peer], strict=True)])
        case = f"step blocked by a background save, {size}"
        row = result_row(
            case, "s", seconds[kinds[0]], peer, seconds[peer], ratios, agree=agree, goal=goal, at_most=True
        )
        print(
            f"{case}: {statistics.median(seconds[kinds[0]]):.3f} s, {peer} {statistics.median(seconds[peer]):.3f} s  "
            f"ratio {ratios['median']:.3f} ({ratios['low']:.3f} to {ratios['high']:.3f}), goal {goal}",
            flush=True,
        )
        rows.append(row)
    return rows


def same_weights(folder: Path, other: Path) -> bool:
    """Whether two folders of safetensors hold the same names with the same bits."""
    first, second = (
        {name: file for path in where.glob("*.safetensors") for file in [safe_open(path, "pt")] for name in file.keys()}  # noqa: SIM118
        for where in (folder, other)
    )
    return first.keys() == second.keys() and all(
        torch.equal(first[name].get_tensor(name).view(torch.int32), second[name].get_tensor(name).view(torch.int32))
        for name in first
    )


class Team:
    """The two processes of a side, which wait while the other runs."""

    def __init__(self, side: str, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.side, self.folder = side, folder
        self._processes, self._pipes = [], []
        store = tempfile.mktemp(dir=folder)
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(side, rank, folder, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def run(self, case: str) -> Taken:
        for pipe in self._pipes:
            pipe.send(case)
        for pipe in self._pipes:
            pipe.recv()  # What the case before has left is gone.
        peak = 0.0
        while not all(pipe.poll() for pipe in self._pipes):
            peak = max(peak, *(_anonymous_gib(process.pid) for process in self._processes))
            time.sleep(0.005)
        return Taken(max(pipe.recv() for pipe in self._pipes), peak)

    def loaded_is(self, folder: Path) -> bool:
        """Whether the model that is held has the weights in `folder`."""
        self.run("HF save")
        return same_weights(folder, self.folder / f"{self.side} HF")

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=20)
            process.kill()


def _anonymous_gib(pid: int | None) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("RssAnon")), 0.0)


def _serve(side: str, rank: int, folder: Path, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    cases = {OURS: Ours, PEER: Theirs}[side](folder).cases()
    pipe.send(None)
    while (case := pipe.recv()) is not None:
        prepare, timed, after = cases[case]
        prepare()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pipe.send(None)
        dist.barrier()
        started = time.perf_counter()
        timed()
        seconds = time.perf_counter() - started
        after()
        dist.barrier()
        pipe.send(seconds)
    dist.destroy_process_group()


# What is done before, what is timed, and what after.
Case = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]


def _nothing() -> None:
    pass


def _empty(folder: Path) -> None:
    """A new folder in the place of an old one."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    dist.barrier()


def _wait_for_disk(folder: Path) -> None:
    """So that the next case does not wait for what this one has written."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


class Ours:
    """As the trainer does it."""

    def __init__(self, folder: Path) -> None:
        from crossdock.models import FAMILIES

        self.family = FAMILIES["qwen3"]
        self.source, self.hf, self.dcp = folder / "model", folder / f"{OURS} HF", folder / f"{OURS} DCP"
        self.model: PreTrainedModel | None = None
        self._checkpointer: Any = None
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def cases(self) -> dict[str, Case]:
        return {
            "HF load": (self.drop, self.load_hf, _nothing),
            "HF save": (lambda: _empty(self.hf), self.save_hf, lambda: _wait_for_disk(self.hf)),
            "DCP save": (lambda: _empty(self.dcp), lambda: self.checkpointer().save(1, {}, blocking=True), _nothing),
            "DCP load": (self.drop, self.load_dcp, _nothing),
            "blocking save": (_nothing, lambda: self.checkpointer().save(1, {}, blocking=True), _nothing),
            "background save": (_nothing, lambda: self.checkpointer().save(1, {}), lambda: self.checkpointer().wait()),
            "plain copy": (self.prepare_copy, self.copy, _nothing),
        }

    def drop(self) -> None:
        self.model = self._checkpointer = None
        self._copies = []

    def build(self, weights: Any) -> PreTrainedModel:
        from crossdock.models import build_model, materialise
        from crossdock.moe_config import MoEConfig
        from crossdock.parallel import ParallelDims, parallelize

        model = build_model(self.family, self.family.hf_config_from(self.source), MoEConfig(), torch.float32)
        if weights is not None:
            weights.check(model, self.family.hf_keys)
        parallelize(model, ParallelDims(WORLD_SIZE, ep=WORLD_SIZE).build_mesh("cpu"))
        materialise(self.family, model, torch.device("cpu"), seed=None, weights=weights)
        return model

    def load_hf(self) -> None:
        from crossdock.checkpoint import HFCheckpoint

        self.model = self.build(HFCheckpoint.open(self.source))

    def save_hf(self) -> None:
        from crossdock.checkpoint import save_hf

        assert self.model is not None
        save_hf(self.model, self.family.hf_keys, self.hf, {}, "F32")

    def checkpointer(self) -> Any:
        from crossdock.checkpoint import Checkpointer

        if self._checkpointer is None:
            assert self.model is not None
            self._checkpointer = Checkpointer(self.dcp, self.model, None, 1, async_mode="async")
        return self._checkpointer

    def load_dcp(self) -> None:
        self.model = self.build(None)
        self.checkpointer().load(1)

    def prepare_copy(self) -> None:
        from crossdock.parallel import local_part

        assert self.model is not None
        if not self._copies:
            parts = [local_part(parameter.detach()) for parameter in self.model.parameters()]
            self._copies = [(torch.empty_like(part), part) for part in parts]

    def copy(self) -> None:
        for copy, part in self._copies:
            copy.copy_(part)


class Theirs:
    """transformers' own distributed loading and saving."""

    def __init__(self, folder: Path) -> None:
        self.source, self.hf, self.dcp = folder / "model", folder / f"{PEER} HF", folder / f"{PEER} DCP"
        self.model: PreTrainedModel | None = None

    def cases(self) -> dict[str, Case]:
        return {
            "HF load": (self.drop, lambda: self.load(self.source), _nothing),
            "HF save": (lambda: _empty(self.hf), lambda: self.save(self.hf), lambda: _wait_for_disk(self.hf)),
            "DCP save": (lambda: _empty(self.dcp), lambda: self.save(self.dcp, distributed_checkpoint=True), _nothing),
            "DCP load": (self.drop, lambda: self.load(self.dcp), _nothing),
        }

    def drop(self) -> None:
        self.model = None

    def load(self, folder: Path) -> None:
        config = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=WORLD_SIZE)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config)

    def save(self, folder: Path, **options: Any) -> None:
        assert self.model is not None
        self.model.save_pretrained(folder, is_main_process=dist.get_rank() == 0, **options)


if __name__ == "__main__":
    sys.exit(main())
