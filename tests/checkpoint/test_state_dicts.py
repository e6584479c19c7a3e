"""State dicts in memory: Hugging Face's names in, a model's layout out, and back, for every family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from crossdock.checkpoint import CheckpointError, HFCheckpoint, expert_range, from_hf, to_hf, validate_experts
from crossdock.models import FAMILIES, build_model, materialise
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from tests.checkpoint.hf_folders import differences, read_tensors
from tests.models.tiny_families import SIZES, write_family
from tests.ranks import RankPool


def _num_experts(name: str) -> int:
    return next(SIZES[name][key] for key in SIZES[name] if key.startswith(("num_experts", "num_local", "n_routed")))


@torch.no_grad()
def there_and_back(name: str, folder: str, ep: int, distributed: bool = False) -> dict[str, Any]:
    """What differs, on this rank: from what the loader makes of the folder, and from the tensors in it."""
    family, keys, experts = FAMILIES[name], FAMILIES[name].hf_keys, _num_experts(name)
    tensors = read_tensors(Path(folder))
    mesh = ParallelDims(dist.get_world_size(), ep=ep).build_mesh("cpu")
    models = []
    for _ in range(2):
        model = build_model(family, family.hf_config_from(Path(folder)), MoEConfig(), torch.float32)
        parallelize(model, mesh)
        materialise(family, model, torch.device("cpu"), weights=HFCheckpoint.open(Path(folder)))
        models.append(model)
    loaded, filled = models
    for parameter in filled.parameters():
        parameter.fill_(torch.nan)
    own = expert_range(experts, mesh)
    if not keys.packed:  # nothing is needed of other ranks' experts
        foreign = [f".experts.{expert}." for expert in range(experts) if expert not in own]
        tensors = {key: value for key, value in tensors.items() if not any(part in key for part in foreign)}
    values = tensors
    if distributed:
        values = {key: distribute_tensor(value, mesh["ep_shard"], [Shard(0)]) for key, value in tensors.items()}
    state = from_hf(values, keys, experts, mesh)
    own_state = filled.state_dict()
    for key, value in state.items():
        if key in own_state:
            target = own_state[key]
            if isinstance(target, DTensor) and ".experts." not in key:
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                value = distribute_tensor(whole, target.device_mesh, target.placements)
            target.copy_(value)
    pairs = zip(loaded.named_parameters(), filled.parameters(), strict=True)
    wrong = [key for (key, left), right in pairs if not torch.equal(_local(left), _local(right))]
    back = to_hf(state, keys, experts)
    back = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in back.items()}
    return {"loaded": wrong, "back": differences(back, tensors), "range": own}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("name", SIZES)
def test_equals_what_the_loader_makes_and_comes_back_bit_equal(ranks: RankPool, tmp_path: Path, name: str) -> None:
    write_family(tmp_path, name)
    for result in ranks.run(2, there_and_back, name, str(tmp_path), 2):
        assert result["loaded"] == []
        assert result["back"] == []


def test_sharded_experts_and_ranges(ranks: RankPool, tmp_path: Path) -> None:
    write_family(tmp_path, "qwen3")
    for distributed in (False, True):
        results = ranks.run(4, there_and_back, "qwen3", str(tmp_path), 2, distributed)
        assert [result["range"] for result in results] == [range(2), range(2, 5)] * 2
        for result in results:
            assert result["loaded"] == []
            assert result["back"] == []


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    keys = FAMILIES["mixtral"].hf_keys
    tensors = read_tensors(write_family(tmp_path, "mixtral"))
    validate_experts(tensors, keys, 5)
    missing = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    del tensors[missing]
    for check in (validate_experts, from_hf):
        with pytest.raises(CheckpointError, match=rf"lacks {missing}$"):
            check(tensors, keys, 5)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.block_sparse_moe\.experts\.5\.w1"):
        validate_experts(tensors, keys, 6)
    with pytest.raises(CheckpointError, match="holds no expert"):
        validate_experts({"model.norm.weight": torch.ones(2)}, keys, 5)


def test_block_of_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "from_hf" in block)
    tensors = read_tensors(write_family(tmp_path, "qwen3"))
    names: dict[str, Any] = {"state_dict": tensors, "num_experts": 5, "mesh": None}
    exec(compile(block, "docs/models.md", "exec"), names)
    assert differences(names["state_dict"], tensors) == []
    assert names["state"]["model.layers.0.mlp.experts.down_projs"].shape == (5, 16, 32)
