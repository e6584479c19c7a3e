"""Wherever experts have moved to, files and state dicts have them by logical expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from crossdock.balance import BalanceConfig, Balancer
from crossdock.checkpoint import HFCheckpoint, save_hf, to_hf
from crossdock.models import FAMILIES, build_model, materialise
from crossdock.moe import moe_layers
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from tests.checkpoint.hf_folders import differences, read_tensors
from tests.models.tiny_families import SIZES, write_family
from tests.ranks import RankPool


@torch.no_grad()
def _move_and_save(name: str, folder: str) -> tuple[list[tuple[int, ...]], list[str]]:
    """Where experts are after a migration, and which tensors of the state dict are not those of the folder."""
    family, source = FAMILIES[name], Path(folder)
    model = build_model(family, family.hf_config_from(source), MoEConfig(), torch.float32)
    parallelize(model, ParallelDims(2, ep=2).build_mesh("cpu"))
    weights = HFCheckpoint.open(source)
    materialise(family, model, torch.device("cpu"), weights=weights)
    balancer = Balancer(model, BalanceConfig("eplb", move_cost=0.0, move_if_it_pays=False))
    layers = moe_layers(model)
    num_experts = next(iter(layers.values())).num_experts
    loads = 1 / torch.arange(1, num_experts + 1).double()
    balancer.monitor.average = loads.expand(len(layers), num_experts)
    balancer.rebalance(always=True)
    placements = {layer_name: layer.placement for layer_name, layer in layers.items()}
    save_hf(model, family.keys(model), source.parent / "moved", {}, "F32")
    back = to_hf(model.state_dict(), family.keys(model), num_experts, placements)
    back = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in back.items()}
    tensors = read_tensors(source)
    wrong = differences(back, {key: tensors[key] for key in back})
    return [each.row_to_expert for each in placements.values()], wrong


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_moved_experts_are_saved_by_their_number(ranks: RankPool, tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "moved").mkdir()
    write_family(source, name)
    assert name in SIZES
    for rows, wrong in ranks.run(2, _move_and_save, name, str(source)):
        assert any(row != tuple(range(len(row))) for row in rows), "experts have moved"
        assert not wrong
    assert not differences(read_tensors(tmp_path / "moved"), read_tensors(source))
