"""Pipeline stages: cut by cost, run by any schedule with the numbers of one process, gathered and reduced once."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig

from crossdock.config import ConfigError, load_config, validate
from crossdock.experts import UnpackedExperts
from crossdock.models import FAMILIES, batch_loss, build_model, materialise
from crossdock.moe import moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import (
    Boundary,
    GradientManager,
    ParallelDims,
    ParallelismConfig,
    Pipeline,
    PipelineSchedule,
    cut_blocks,
    parallelize,
    stages_of,
)
from crossdock.parallel.stages import _balanced
from tests.parallel.whole_runs import DOCUMENTS, compare, run_on
from tests.ranks import RankPool
from tests.tiny import write_assets

SHORT = ("--training.seq-len", "32")
PP2 = ("--parallelism.pipeline-parallel-degree", "2")
ZERO_BUBBLE = ("--parallelism.pipeline-parallel-schedule", "zero_bubble")
BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 8, 32, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def one_process(ranks: RankPool, folder: Path) -> dict[str, Any]:
    return run_on(ranks, folder, "qwen3", 1, {}, num_layers=5)


@pytest.mark.parametrize(
    ("schedule", "per_rank", "more"),
    [
        ("gpipe", 1, ("--parallelism.reshard-after-forward", "always", "--activation-checkpoint.mode", "selective")),
        ("interleaved_1f1b", 2, ("--activation-checkpoint.mode", "full")),
        ("zero_bubble", 1, ()),
        pytest.param("zero_bubble", 2, (), marks=pytest.mark.slow),
        ("zbv", 2, ()),
    ],
)
def test_a_run_with_any_schedule_equals_one_process(
    ranks: RankPool, folder: Path, one_process: dict[str, Any], schedule: str, per_rank: int, more: tuple[str, ...]
) -> None:
    options = ("--parallelism.pipeline-parallel-schedule", schedule)
    stages = ("--parallelism.pipeline-parallel-stages-per-rank", str(per_rank))
    compare(run_on(ranks, folder, "qwen3", 2, {"pp": 2}, *options, *stages, *more, num_layers=5), one_process)


def test_a_stage_without_moe_layers_works(ranks: RankPool, folder: Path) -> None:
    # The first of the two layers is dense.
    result = run_on(ranks, folder, "deepseek_v3", 4, {"pp": 2, "ep": 2}, *DOCUMENTS)
    assert [rank["margins"].size == 0 for rank in result["ranks"]] == [True, True, False, False]
    compare(result, run_on(ranks, folder, "deepseek_v3", 1, {}, *DOCUMENTS))


class _Counted(TorchDispatchMode):
    """Counts FSDP's collectives by the names of their operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "_base_" in str(func):
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def collectives(schedule: PipelineSchedule, num_microbatches: int, ep: int) -> tuple[int, list[Counter[str]]]:
    """Groups of parameters that FSDP gathers on this rank, and its collectives in each of two steps."""
    meshes = ParallelDims(dist.get_world_size(), pp=2, ep=ep).build_mesh("cpu")
    model = build(num_layers=4)
    parallelize(model, meshes, ParallelismConfig(pipeline_parallel_schedule=schedule))
    materialise(FAMILIES["qwen3"], model, torch.device("cpu"))
    boundary = Boundary((BATCH, LENGTH, HIDDEN), torch.float32, torch.device("cpu"))
    gradients = GradientManager(model, meshes)
    pipeline = Pipeline(
        model, meshes, gradients, batch_loss, boundary, schedule=schedule, num_microbatches=num_microbatches
    )
    tokens = torch.randint(0, VOCABULARY, (num_microbatches, BATCH, LENGTH))
    batches = [{"input_ids": rows, "labels": rows} for rows in tokens]
    counts = []
    for _ in range(2):
        with _Counted() as counted:
            pipeline.step(batches)
        counts.append(counted.counts)
        gradients.clip(1.0)
        model.zero_grad()
    stages = stages_of(model)
    assert stages is not None
    at_an_end = stages.has_first or stages.has_last
    # A block's dense parameters, and its experts where other ranks share them; embedding, or norm and head.
    return (1 if ep == 1 else 2) * sum(len(stages.blocks[stage]) for stage in stages.own) + at_an_end, counts


@pytest.mark.parametrize(
    ("world_size", "ep", "schedule"),
    [
        *((4, 1, schedule) for schedule in ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv")),
        pytest.param(8, 2, "1f1b", marks=pytest.mark.slow),
        (8, 2, "zbv"),
    ],
)
def test_parameters_are_gathered_and_gradients_reduced_once_per_step(
    ranks: RankPool, world_size: int, ep: int, schedule: PipelineSchedule
) -> None:
    for micro_batches in (2, 4):
        for groups, steps in ranks.run(world_size, collectives, schedule, micro_batches, ep):
            for counts in steps:
                assert counts == {"_allgather_base_": groups, "_reduce_scatter_base_": groups}


def build(num_layers: int, **settings: Any) -> Any:
    """A tiny Qwen3-MoE on the meta device."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": 16,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    return build_model(FAMILIES["qwen3"], Qwen3MoeConfig(**(sizes | settings)), MoEConfig(), torch.float32)


def test_stages_are_cut_where_the_costliest_costs_least() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_blocks, num_stages in ((1, 1), (4, 4), (7, 3), (9, 4)):
        costs = torch.randint(1, 20, (num_blocks,), generator=generator).tolist()
        blocks = _balanced(costs, num_stages)
        assert [index for block in blocks for index in block] == list(range(num_blocks))
        ends = ((0, *inner, num_blocks) for inner in combinations(range(1, num_blocks), num_stages - 1))
        best = min(max(sum(costs[a:b]) for a, b in pairwise(each)) for each in ends)
        assert max(sum(costs[i] for i in block) for block in blocks) == best


def test_the_head_counts_and_of_experts_those_that_a_token_visits() -> None:
    assert [len(stage) for stage in cut_blocks(build(6), 2)] == [3, 3]
    # Queries, keys, values, output; router; two experts of three matrices.
    block = HIDDEN * (32 + 16 + 16 + 32) + HIDDEN * 8 + 2 * 3 * HIDDEN * 16
    for as_blocks, first in ((1.9, 4), (4.1, 5)):
        stages = cut_blocks(build(6, vocab_size=round(as_blocks * block / HIDDEN)), 2)
        assert [len(stage) for stage in stages] == [first, 6 - first]
    # More experts, of which a token visits as many as before, cost nothing.
    assert cut_blocks(build(6, num_experts=64), 2) == cut_blocks(build(6), 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("--parallelism.pipeline-parallel-degree", "4"),
            "2 blocks cannot be 4 pipeline stages; the nearest that fits is 2",
        ),
        (
            (*PP2, "--parallelism.pipeline-parallel-schedule", "zbv"),
            "2 blocks cannot be 4 pipeline stages; the nearest that fits is 1",
        ),
        (
            (*PP2, "--parallelism.pipeline-parallel-stages-per-rank", "2"),
            "stages_per_rank = 2: must be 1 with the schedule 1f1b",
        ),
        ((*PP2, "--training.global-batch-size", "16"), "1 micro-batches; 1f1b needs at least 2, the stages"),
        (
            (*PP2, *ZERO_BUBBLE, "--activation-checkpoint.mode", "full"),
            "activation_checkpoint.mode = 'full': must be none with zero_bubble",
        ),
        ((*PP2, *ZERO_BUBBLE, "--compile.enable"), "compile.enable = True: must be false with zero_bubble"),
        (
            (*PP2, *ZERO_BUBBLE, "--parallelism.reshard-after-forward", "always"),
            "reshard_after_forward = 'always': must be auto or never with zero_bubble",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_stages_is_refused_before_the_start(
    tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    config = load_config(None, ["--model.hf-assets-path", str(write_assets(tmp_path / "assets")), *SHORT, *settings])
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config, 4)


def test_the_nearest_number_of_stages_is_one_that_divides_the_ranks(tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets", num_hidden_layers=3)
    config = load_config(
        None, ["--model.hf-assets-path", str(assets), *SHORT, "--parallelism.pipeline-parallel-degree", "4"]
    )
    with pytest.raises(ConfigError, match=r"3 blocks cannot be 4 pipeline stages; the nearest that fits is 2$"):
        validate(config, 4)


def test_tied_embeddings_are_refused(tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"tie_word_embeddings.*it must be 1"):
        validate(load_config(None, ["--model.hf-assets-path", str(assets), *SHORT, *PP2]), 2)


def whole_call() -> str:
    meshes = ParallelDims(2, pp=2).build_mesh("cpu")
    model = build(2)
    parallelize(model, meshes)
    materialise(FAMILIES["qwen3"], model, torch.device("cpu"))
    with pytest.raises(RuntimeError) as raised:
        model(input_ids=torch.zeros(1, LENGTH, dtype=torch.int64))
    return str(raised.value)


def test_a_part_of_a_model_does_not_run_as_the_whole(ranks: RankPool) -> None:
    assert "as stages of a pipeline" in ranks.run(2, whole_call)[0]


def split_modules() -> None:
    meshes = ParallelDims(2, pp=2).build_mesh("cpu")
    for schedule in ("zero_bubble", "zbv"):
        model = build(4)
        for layer in moe_layers(model).values():
            layer.experts = UnpackedExperts([nn.Linear(HIDDEN, HIDDEN) for _ in range(8)])
        with pytest.raises(ValueError, match=f"{schedule} takes the backward pass in two.*use 1f1b"):
            parallelize(model, meshes, ParallelismConfig(pipeline_parallel_schedule=schedule))


def test_experts_that_are_modules_refuse_a_backward_pass_in_two(ranks: RankPool) -> None:
    ranks.run(2, split_modules)
