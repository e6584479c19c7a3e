"""Settings of `[balance]` that cannot work, or that nothing would look at, are refused by name before ranks start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.balance import BalanceConfig, BalanceError, Balancer, check_sizes
from crossdock.balance.deciding import Deciding
from crossdock.config import ConfigError, load_config, validate
from crossdock.moe import MoE
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, apply_ep
from crossdock.routing import RouterConfig
from tests.ranks import RankPool
from tests.tiny import speeches, write_assets


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_decay": 1.0}, "balance.load_decay = 1.0: must be at least 0 and below 1"),
        ({"rebalance_threshold": 0.5}, "balance.rebalance_threshold = 0.5: must be 0, or above 1"),
        ({"num_redundant_experts": -2}, "balance.num_redundant_experts = -2: must be 0 or more, or -1"),
    ],
)
def test_a_value_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BalanceError, match=message):
        check_sizes(BalanceConfig(**settings), MoEConfig(), 8, 4)


@pytest.mark.parametrize(
    ("balance", "moe", "message"),
    [
        ({"strategy": "eplb", "num_redundant_experts": 6}, {}, "= 6: must be a multiple of.* = 4; the nearest is"),
        ({"strategy": "eplb", "num_redundant_experts": 64}, {}, "= 64: must be at most 24: a rank holds no expert"),
        ({"strategy": "eplb", "rebalance_interval": 0}, {}, "rebalance_interval = 0: must be above 0, or"),
        ({"strategy": "eplb", "rebalance_patience": 3}, {}, "rebalance_patience = 3: needs balance.rebalance_thr"),
        (
            {"strategy": "eplb", "num_redundant_experts": 0, "copy_choice": "nearest"},
            {},
            "copy_choice = 'nearest': must be even with balance.num_redundant_experts = 0",
        ),
        ({"num_redundant_experts": 4}, {}, "num_redundant_experts = 4: needs balance.strategy = eplb"),
        ({"strategy": "eplb", "memory_bound": True}, {}, "memory_bound = True: needs balance.strategy = spill"),
        (
            {"strategy": "spill", "memory_bound": True, "max_borrowed": 1},
            {},
            "max_borrowed = 1: must be 0, or at least 2",
        ),
        ({"strategy": "eplb"}, {"gradient_scale": "output"}, "strategy = 'eplb': must be none with moe.gradient_scale"),
        (
            {"strategy": "spill"},
            {"static_shapes": True, "experts": "grouped_mm"},
            "strategy = 'spill': must be none or eplb with moe.static_shapes",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named(balance: dict[str, Any], moe: dict[str, Any], message: str) -> None:
    with pytest.raises(BalanceError, match=message):
        check_sizes(BalanceConfig(**balance), MoEConfig(**moe), 8, 4)


def test_256_experts_and_32_copies_on_8_ranks_fit() -> None:
    check_sizes(BalanceConfig("eplb", num_redundant_experts=32), MoEConfig(), 256, 8)


def test_a_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets")
    settings = ["--model.hf-assets-path", str(assets), "--data.source", str(speeches(assets))]
    settings += ["--training.seq-len", "32", "--parallelism.expert-parallel-degree", "2"]
    settings += ["--balance.strategy", "eplb", "--balance.num-redundant-experts", "3"]
    with pytest.raises(ConfigError, match=r"balance.num_redundant_experts = 3: must be a multiple of"):
        validate(load_config(None, settings), 2)


def _own_modules() -> str:
    experts = [torch.nn.Linear(8, 8) for _ in range(4)]
    model = torch.nn.Sequential(MoE(8, None, RouterConfig(4, 2), experts=experts))
    apply_ep(model, ParallelDims(2, ep=2).build_mesh("cpu"))
    try:
        Balancer(model, BalanceConfig("eplb"))
    except BalanceError as error:
        return str(error)
    return ""


def test_experts_that_are_modules_are_refused(ranks: RankPool) -> None:
    for message in ranks.run(2, _own_modules):
        assert message == (
            "balance.strategy = 'eplb': must be none: the experts of this model are modules, which cannot be copied"
        )


def test_auto_acts_on_what_it_sees_and_says_so() -> None:
    even = Deciding(BalanceConfig("auto"), num_nodes=1)
    assert not any(even.update(1.05, 1.05) for _ in range(50))
    assert not even.is_due()
    assert not even.spills

    skewed = Deciding(BalanceConfig("auto"), num_nodes=1)
    (message,) = [message for _ in range(10) for message in skewed.update(2.5, 2.5)]
    assert "max/mean over ranks is 2.50" in message
    assert skewed.is_due()
    assert not skewed.spills
    skewed.looked()
    (message,) = [message for _ in range(10) for message in skewed.update(2.5, 1.4)]
    assert "max/mean is 1.40" in message
    assert skewed.spills

    far = Deciding(BalanceConfig("auto"), num_nodes=2)
    for _ in range(10):
        far.update(2.5, 2.5)
    far.looked()
    messages = [message for _ in range(30) for message in far.update(2.5, 1.4)]
    assert far.moves
    assert not far.spills
    assert len(messages) == 1
    assert "2 nodes" in messages[0]


def test_auto_keeps_a_bound_on_memory_from_the_first_step() -> None:
    assert Deciding(BalanceConfig("auto", memory_bound=True), num_nodes=2).spills


@pytest.mark.parametrize("interval", [1, 5, 9, 10, 100])
def test_auto_relieves_whatever_the_interval(interval: int) -> None:
    deciding = Deciding(BalanceConfig("auto", rebalance_interval=interval), num_nodes=1)
    for _ in range(40):
        deciding.update(2.5, 1.4)
        if deciding.is_due():
            deciding.looked()
    assert deciding.moves
    assert deciding.spills


def test_a_threshold_asks_for_a_look_before_the_interval_is_over() -> None:
    deciding = Deciding(BalanceConfig("eplb", rebalance_threshold=1.5, rebalance_patience=3), num_nodes=1)
    for after in (1.6, 1.6, 1.4, 1.6, 1.6):
        deciding.update(2.0, after)
        assert not deciding.is_due()
    deciding.update(2.0, 1.6)
    assert deciding.is_due()
    deciding.looked()
    assert not deciding.is_due()
