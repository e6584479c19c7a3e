"""What `crossdock plan` says a rank holds and sends is what a rank of a real run holds and sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import RankPool
from tests.tiny import write_assets
from tests.tools.plan_runs import SIZES, cache_beside, counted_run, predicted, sent_by_dimension

LAYOUTS = {
    "ep 4": ["--parallelism.expert-parallel-degree", "4"],
    "ep 2, ep_shard 2, full recompute": [
        *("--parallelism.expert-parallel-degree", "2", "--activation-checkpoint.mode", "full"),
    ],
    "dp_replicate 2, ep 2, selective recompute, 2 micro-batches": [
        *("--parallelism.expert-parallel-degree", "2", "--parallelism.data-parallel-replicate-degree", "2"),
        *("--activation-checkpoint.mode", "selective", "--training.global-batch-size", "16"),
    ],
    "tp 2, ep 4, bfloat16": [
        *("--parallelism.expert-parallel-degree", "4", "--parallelism.tensor-parallel-degree", "2"),
        *("--training.dtype", "bfloat16"),
    ],
    "pp 2, ep 2": [
        *("--parallelism.expert-parallel-degree", "2", "--parallelism.pipeline-parallel-degree", "2"),
        *("--training.global-batch-size", "16"),
    ],
    "cp 2, ep 2, all-gather": [
        *("--parallelism.expert-parallel-degree", "2", "--parallelism.context-parallel-degree", "2"),
        *("--moe.dispatcher", "allgather"),
    ],
    "nodes of 2, hierarchical": [
        *("--parallelism.expert-parallel-degree", "4", "--moe.dispatcher", "hierarchical"),
        *("--moe.ranks-per-node", "2"),
    ],
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("plan") / "assets", **SIZES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_holds_and_sends_what_a_run_does(layout: str, assets: Path, tmp_path: Path, ranks: RankPool) -> None:
    overrides, cache = LAYOUTS[layout], cache_beside(assets)
    run = ranks.run(4, counted_run, str(assets), cache, str(tmp_path / "run"), overrides)
    for rank, real in enumerate(run):
        plan = predicted(str(assets), cache, overrides, 4, rank)
        assert sent_by_dimension(plan.counted) == real["sent"], f"rank {rank}"
        assert (plan.within, plan.between, plan.metadata) == real["traffic"], f"rank {rank}"
        assert plan.counted.peak == pytest.approx(real["peak"], rel=0.05), f"rank {rank}"
