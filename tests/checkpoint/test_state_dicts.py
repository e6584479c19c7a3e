"""State dicts in memory: Hugging Face's names in, a model's layout out, and back, for every family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from crossdock.checkpoint import CheckpointError, HFCheckpoint, expert_range, from_hf, to_hf, validate_experts
from crossdock.models import FAMILIES, build_model, materialise
from crossdock.moe_config import MoEConfig
from crossdock.parallel import ParallelDims, parallelize
from tests.checkpoint.hf_folders import differences, read_tensors
from tests.checkpoint.quantizing import quantize_fp8, quantize_mxfp4
from tests.models.tiny_families import SIZES, write_family
from tests.models.tiny_generic import families_with_a_plan, tiny_config, tiny_model
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


def spread(folder: str, num_experts: int, dim: int) -> dict[str, Any]:
    """What `from_hf` makes of tensors that are spread over the very ranks of `ep`, against plain ones; own experts.

    One rank has them in another order; and what they would be in FP8, and where a rank lacks one.
    """
    tensors, keys = read_tensors(Path(folder)), FAMILIES["qwen3"].hf_keys
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    values = {key: distribute_tensor(value, mesh, [Shard(min(dim, value.ndim - 1))]) for key, value in tensors.items()}
    if dist.get_rank() == 1:
        values = dict(reversed(values.items()))
    wanted, state = (from_hf(each, keys, num_experts, mesh) for each in (tensors, values))
    differing = [key for key, value in wanted.items() if ".experts." in key and not value.equal(state[key])]
    stored, meant = quantize_fp8(tensors, (128, 128))
    spread_out = {key: _spread(value, mesh) for key, value in stored.items()}
    quantised = (from_hf(each, keys, num_experts, mesh) for each in (meant, spread_out))
    wanted, state = ({key: value for key, value in each.items() if ".experts." in key} for each in quantised)
    # Whole tensors: ranks without experts have them in the same dtype.
    differing += [key for key, value in wanted.items() if not _whole(value).equal(_whole(state[key]))]
    if dist.get_rank() == 0:
        values = {key: value for key, value in values.items() if "experts.1.up_proj" not in key}
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is missing|rank 0 lacks .*up_proj\.weight, a DTensor"):
        from_hf(values, keys, num_experts, mesh)
    # Empty slots are where the others are.
    assert all(
        value.device.type == "meta" for value in from_hf(_without_values(tensors), keys, num_experts, mesh).values()
    )
    own = (value for key, value in state.items() if key.endswith("layers.0.mlp.experts.down_projs"))
    rows = [list(value.to_local().shape) for value in own if isinstance(value, DTensor)]
    return {"differing": differing, "rows": rows, "range": expert_range(num_experts, mesh)}


def _without_values(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to("meta") for key, value in tensors.items()}


def from_unlike(folder: str, unlike: str) -> str:
    """What `from_hf` says on this rank where the last one's tensors, which are DTensors elsewhere, are none such."""
    tensors, rank, size = read_tensors(Path(folder)), dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    values: dict[str, Any] = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in tensors.items()}
    others: dict[str, dict[str, Any]] = {
        "no tensors": {},
        "no experts": {"model.norm.weight": tensors["model.norm.weight"]},
        "whole ones": tensors,
        "another dtype": {key: value.bfloat16() for key, value in values.items()},
        "not a tensor": values | {"model.norm.weight": None},
    }
    with pytest.raises((CheckpointError, AttributeError)) as caught:
        from_hf(others[unlike] if rank == size - 1 else values, FAMILIES["qwen3"].hf_keys, 5, mesh)
    return str(caught.value)


UNLIKE = {
    "no tensors": "holds no expert",
    "no experts": "holds no expert",
    "whole ones": r"rank 1 lacks .*, a DTensor over the ranks \[0, 1\]",
    "another dtype": r"is torch\.float32 .* on rank 0, torch\.bfloat16 .* on rank 1",
    "not a tensor": "'NoneType' object has no attribute",
}


@pytest.mark.parametrize("unlike", UNLIKE)
def test_all_ranks_raise_where_one_has_other_tensors(ranks: RankPool, tmp_path: Path, unlike: str) -> None:
    write_family(tmp_path, "qwen3")
    for message in ranks.run(2, from_unlike, str(tmp_path), unlike):
        assert re.search(UNLIKE[unlike], message), message


def _spread(value: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Over the first dimension, even what no collective of gloo moves."""
    part = value.chunk(mesh.size())[mesh.get_local_rank()] if len(value) % mesh.size() == 0 else value
    return DTensor.from_local(part, mesh, [Shard(0) if part is not value else Replicate()], run_check=False)


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.mark.parametrize(("num_experts", "world_size"), [(5, 2), (2, 4)])
def test_tensors_spread_over_the_ranks_of_ep(
    ranks: RankPool, tmp_path: Path, num_experts: int, world_size: int
) -> None:
    write_family(tmp_path, "qwen3", num_experts=num_experts)
    for dim in (0, 1):
        results = ranks.run(world_size, spread, str(tmp_path), num_experts, dim)
        assert [result["differing"] for result in results] == [[]] * world_size
        slots = -(-num_experts // world_size)
        assert [result["rows"] for result in results] == [[[slots, 16, 32]]] * world_size
        assert sum(len(result["range"]) for result in results) == num_experts


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_quantised_values_become_what_they_stand_for(tmp_path: Path, name: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16} if name == "gpt_oss" else {}
    tensors, keys = read_tensors(write_family(tmp_path, name, **sizes)), FAMILIES[name].hf_keys
    stored, meant = quantize_mxfp4(tensors) if name == "gpt_oss" else quantize_fp8(tensors, (128, 128))
    ours, theirs = from_hf(stored, keys, 5), from_hf(meant, keys, 5)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_keys_that_are_converted(tmp_path: Path) -> None:
    config = tiny_config(families_with_a_plan()["granitemoe"])
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        adapted = FAMILIES["generic"].adapt(tiny_model(config), MoEConfig())
    keys, tensors = FAMILIES["generic"].keys(adapted), read_tensors(tmp_path)
    state = from_hf(tensors, keys, 6)
    assert {key for key in state if ".experts." in key} == {
        key for key in adapted.state_dict() if ".experts." in key and key.endswith("projs")
    }
    assert differences(to_hf(state, keys, 6), tensors) == []


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    keys = FAMILIES["mixtral"].hf_keys
    tensors = read_tensors(write_family(tmp_path / "mixtral", "mixtral"))
    validate_experts(tensors, keys, 5)
    state = from_hf(tensors, keys, 5)
    packed, packed_keys = read_tensors(write_family(tmp_path / "gpt_oss", "gpt_oss")), FAMILIES["gpt_oss"].hf_keys
    w3 = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    bias = "model.layers.1.mlp.experts.down_proj_bias"
    ups = [key for key in tensors if key.endswith("w3.weight")]
    narrow_ups = tensors | dict.fromkeys(ups, torch.ones(3, 32))
    transposed = {key: value.t() if key.endswith("w2.weight") else value for key, value in tensors.items()}
    cases = [
        ({key: value for key, value in tensors.items() if key != w3}, keys, 5, rf": {w3} is missing$"),
        (tensors, keys, 6, r": model\.layers\.0\.block_sparse_moe\.experts\.5\.w1\.weight is missing"),
        (tensors, keys, 4, r"experts\.4\.w1\.weight is of expert 4, there are 4"),
        (tensors | {w3: torch.ones(15, 32)}, keys, 5, r"experts of model\.layers\.1\.mlp\.experts differ in shape"),
        (tensors | {w3: torch.ones(16)}, keys, 5, r"has shape \[16\], not one of 2 dimensions"),
        (narrow_ups, keys, 5, r"differ in shape: \[\(32, 3\), \(32, 16\)\]"),
        (transposed, keys, 5, r"matrices \[32, 32\] and \[32, 16\], which do not go together"),
        ({"model.norm.weight": torch.ones(2)}, keys, 5, "holds no expert"),
        (packed, packed_keys, 6, r"gate_up_proj has shape \[5, 32, 32\], not of 6 experts"),
        (packed, packed_keys, 3, r"not of 3 experts"),
        ({key: value for key, value in packed.items() if key != bias}, packed_keys, 5, rf": {bias} is missing$"),
        (
            packed | {bias: torch.ones(5, 31)},
            packed_keys,
            5,
            r"\[16, 32\] and down_bias \[31\], which do not go together",
        ),
    ]
    for state_dict, of_family, num_experts, message in cases:
        for check in (validate_experts, from_hf):
            with pytest.raises(CheckpointError, match=message):
                check(state_dict, of_family, num_experts)
    for wrong in (4, 6):
        with pytest.raises(CheckpointError, match=rf"not {wrong} rows"):
            to_hf(state, keys, wrong)


def test_block_of_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "from_hf" in block)
    tensors = read_tensors(write_family(tmp_path, "qwen3"))
    names: dict[str, Any] = {"state_dict": tensors, "num_experts": 5, "mesh": None}
    exec(compile(block, "docs/models.md", "exec"), names)
    assert differences(names["state_dict"], tensors) == []
    assert names["state"]["model.layers.0.mlp.experts.down_projs"].shape == (5, 16, 32)
