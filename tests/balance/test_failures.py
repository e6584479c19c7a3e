"""A rank that fails while experts are balanced: the others hear of it, and nothing half done is kept."""

from __future__ import annotations

import importlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock.balance import BalanceConfig, Balancer, migrate
from crossdock.dispatch import RankFailure
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, apply_ep
from tests.balance.test_training import OFTEN, SKEWED
from tests.parallel.test_gradients import HIDDEN, LENGTH, build
from tests.parallel.whole_runs import compare, run_on
from tests.ranks import RankPool
from tests.tiny import run_trainer


def _die_in_the_second_migration(*arguments: Any) -> dict[str, Any]:
    """The last rank ends when some of the second migration's exchanges are done."""
    # The package has a function of that name.
    migrating = importlib.import_module("crossdock.balance.migrate")
    exchange, migrations, exchanges = migrating._exchange, 0, 0

    def counted(*arguments: Any) -> Any:
        nonlocal migrations, exchanges
        migrations, exchanges = migrations + 1, 0
        return migrate(*arguments, chunk_bytes=4096)

    def fatal(*arguments: Any) -> int:
        nonlocal exchanges
        exchanges += 1
        if migrations == 2 and exchanges == 4 and dist.get_rank() == dist.get_world_size() - 1:
            os._exit(9)
        return exchange(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crossdock.balance.balancer.migrate", counted)
        patch.setattr(migrating, "_exchange", fatal)
        return run_trainer(*arguments)


def test_a_run_whose_rank_died_in_a_migration_goes_on_from_its_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    settings = (*SKEWED, "--training.steps", "12", "--checkpoint.interval", "3")
    balanced = ("--balance.strategy", "eplb", *OFTEN)
    folder = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"MigrationError.*start again from the last checkpoint"):
        run_on(
            ranks, tmp_path, "qwen3", 4, {"ep": 4}, *settings, *balanced, run_folder=folder,
            function=_die_in_the_second_migration,
        )  # fmt: skip
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["step-00000003", "step-00000006"]
    resumed = run_on(ranks, tmp_path, "qwen3", 4, {"ep": 4}, *settings, *balanced, run_folder=folder)
    compare(resumed, run_on(ranks, tmp_path, "qwen3", 4, {"ep": 4}, *settings))


def _refuse(strategy: str) -> str:
    """The last rank has tokens of another size."""
    model = build(8, torch.float32, MoEConfig())
    apply_ep(model, ParallelDims(dist.get_world_size(), ep=dist.get_world_size()).build_mesh("cpu"))
    config = BalanceConfig(strategy, spill_if_it_pays=False) if "spill" in strategy else BalanceConfig(strategy)  # type: ignore[arg-type]
    balancer = Balancer(model, config)
    if strategy != "spill":
        balancer.monitor.average = torch.arange(16.0).view(2, 8).double()
        balancer.rebalance(always=True)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    try:
        model.layers[0].moe(torch.randn(1, LENGTH, HIDDEN + is_last))  # type: ignore[operator]
    except (ValueError, RankFailure) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", ["eplb", "spill", "eplb+spill"])
def test_all_ranks_hear_of_one_that_refuses(ranks: RankPool, strategy: str) -> None:
    *others, last = ranks.run(2, partial(_refuse, strategy))
    assert "features" in last
    assert all("rank 1" in message for message in others)
