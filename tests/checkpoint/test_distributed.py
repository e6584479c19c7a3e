"""Checkpoints from any layout to any layout, by logical expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from crossdock.checkpoint import Checkpointer, CheckpointError, distributed, latest_step
from crossdock.moe import MoE
from crossdock.parallel import ActivationCheckpointConfig, ParallelismConfig
from tests.checkpoint.small import HIDDEN, WORDS, Contents, Run, Small
from tests.ranks import RankPool

STEPS = 3
COUNTERS = {"step": STEPS, "samples": 36, "skipped_steps": 1}

# Expert-parallel degrees by number of experts and of ranks. At degree 2 of 4 ranks two share each expert, at 1 all do.
# Nine experts divide evenly over no layout but those that have them all, eight over all but three ranks.
LAYOUTS: dict[int, dict[int, tuple[int, ...]]] = {
    8: {1: (1,), 2: (2,), 3: (3,), 4: (4,)},
    9: {1: (1,), 2: (2, 1), 4: (4, 2)},
}

KEPT = ParallelismConfig(reshard_after_forward="never")


def save_layouts(folder: str, num_experts: int) -> dict[int, dict[str, Any]]:
    """Train, save, and go on for a step meanwhile, at every layout of this number of ranks.

    In float64, where layouts differ by the order of their sums alone.
    """
    results = {}
    for ep in LAYOUTS[num_experts][dist.get_world_size()]:
        asynchronous = {"async_mode": "async"}
        run = Run(f"{folder}/{dist.get_world_size()}-{ep}", ep, num_experts, saving=asynchronous, change=Small.double)
        run.train(STEPS)
        torch.manual_seed(100 + dist.get_rank())
        contents = run.contents()
        run.checkpointer.save(STEPS, COUNTERS)
        results[ep] = {"contents": contents, "random": torch.rand(3).tolist(), "next": run.train(1)[0]}
        run.checkpointer.wait()
    return results


def load_layouts(folders: list[str], num_experts: int) -> dict[int, dict[str, dict[str, Any]]]:
    """Load each checkpoint at every layout of this number of ranks, into a model of other values."""
    results = {}
    for ep in LAYOUTS[num_experts][dist.get_world_size()]:
        run = Run("unused", ep, num_experts, seed=1, change=Small.double)
        run.train(1)
        results[ep] = {}
        for folder in folders:
            counters = run.at(folder).checkpointer.load(STEPS)
            run.step = STEPS
            results[ep][Path(folder).name] = {
                "counters": counters,
                "contents": run.contents(),
                "random": torch.rand(3).tolist(),
                "next": run.train(1)[0],
            }
    return results


@pytest.fixture(scope="module", params=[pytest.param(8, marks=pytest.mark.slow), 9])
def saved(request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Checkpoints of every layout, and what each rank held when it saved them."""
    folder = tmp_path_factory.mktemp("saved")
    layouts: dict[str, list[dict[str, Any]]] = {}
    for world_size, degrees in LAYOUTS[request.param].items():
        results = ranks.run(world_size, save_layouts, str(folder), request.param)
        layouts |= {f"{world_size}-{ep}": [result[ep] for result in results] for ep in degrees}
    return {"folder": folder, "num_experts": request.param, "layouts": layouts}


def assert_equal(ours: Contents, theirs: Contents) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_experts_can_be_told_apart(saved: dict[str, Any]) -> None:
    num_experts = saved["num_experts"]
    contents = saved["layouts"]["4-4"][0]["contents"]
    names = [name for name in contents if ".experts." in name and not name.endswith(" step")]
    assert len(names) == 2 * 2 * 3, "weights and two moments of two matrices in two layers"
    for name in names:
        assert len(np.unique(contents[name].reshape(num_experts, -1), axis=0)) == num_experts, name
    for layer in range(2):
        assert len(np.unique(contents[f"layers.{layer}.moe bias"])) > 1


@pytest.mark.parametrize("world_size", [1, 2, 4, pytest.param(3, marks=pytest.mark.slow)])
def test_any_layout_loads_into_any_other(saved: dict[str, Any], ranks: RankPool, world_size: int) -> None:
    if world_size not in LAYOUTS[saved["num_experts"]]:
        pytest.skip("no layout of these experts")
    folders = [str(saved["folder"] / layout) for layout in saved["layouts"]]
    results = ranks.run(world_size, load_layouts, folders, saved["num_experts"])
    for ep in LAYOUTS[saved["num_experts"]][world_size]:
        for layout, before in saved["layouts"].items():
            for rank in range(world_size):
                after = results[rank][ep][layout]
                assert after["counters"] == COUNTERS
                assert_equal(after["contents"], before[0]["contents"])
                if layout == f"{world_size}-{ep}":
                    assert after["next"] == before[rank]["next"], "the next step is not the uninterrupted run's"
                assert after["next"] == pytest.approx(before[0]["next"], rel=1e-12)
                if len(before) == world_size:
                    assert after["random"] == before[rank]["random"]


def freeze_experts(model: Small) -> None:
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts.requires_grad_(False)


def tie_head(model: Small) -> None:
    model.head = nn.Linear(HIDDEN, WORDS, bias=False)
    model.head.weight = model.embed.weight


def transpose_head(model: Small) -> None:
    """A parameter whose elements lie in memory column by column."""
    model.head.weight = nn.Parameter(model.head.weight.detach().t().contiguous().t())


def evaluate(run: Run) -> None:
    with torch.no_grad():
        run.model(torch.zeros(2, 3, dtype=torch.long))


def miss_a_step(run: Run) -> None:
    run.optimizer.state[next(run.model.parameters())]["step"] -= 1


# Arguments of `Run` for the run that saves and the one that loads; `before` happens between training and saving.
VARIANTS: dict[str, dict[str, Any]] = {
    "activation checkpointing": {
        "saving": {"ep": 2, "activation_checkpoint": ActivationCheckpointConfig("full")},
        "loading": {"ep": 2},
    },
    "bfloat16 parameters": {"saving": {"ep": 2, "change": Small.bfloat16}},
    "experts that are not trained": {"saving": {"ep": 2, "change": freeze_experts}},
    "gathered by an evaluation": {
        "saving": {"ep": 2, "config": KEPT},
        "before": evaluate,
    },
    "one parameter skipped a step": {"saving": {"ep": 2}, "before": miss_a_step},
    "plain tensors": {"saving": {"ep": 0}, "world_size": 1},
    "plain tensors to shards": {"saving": {"ep": 0}, "loading": {"ep": 1}, "world_size": 1},
    "tied weights": {"saving": {"ep": 2, "change": tie_head}},
    "transposed in memory": {"saving": {"ep": 0, "change": transpose_head}, "world_size": 1},
}


def save_and_load(folder: str, variant: str) -> dict[str, Any]:
    settings = VARIANTS[variant]
    run = Run(folder, **settings["saving"])
    run.train(STEPS)
    settings.get("before", lambda run: None)(run)
    run.checkpointer.save(STEPS, {})
    before = {"contents": run.contents(), "next": run.train(1)[0]}
    other = Run(folder, seed=1, **settings.get("loading", settings["saving"]))
    other.train(1)
    other.checkpointer.load(STEPS)
    other.step = STEPS
    return {"before": before, "after": {"contents": other.contents(), "next": other.train(1)[0]}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_as_if_uninterrupted_with(ranks: RankPool, tmp_path: Path, variant: str) -> None:
    for result in ranks.run(VARIANTS[variant].get("world_size", 2), save_and_load, str(tmp_path), variant):
        assert_equal(result["after"]["contents"], result["before"]["contents"])
        assert result["after"]["next"] == result["before"]["next"]


def save_to_small_files(folder: str, file_bytes: int) -> Contents:
    run = Run(folder, 2)
    run.train(1)
    with mock.patch.object(distributed, "_FILE_BYTES", file_bytes):
        run.checkpointer.save(1, {})
    return run.contents()


def load_contents(folder: str) -> Contents:
    run = Run(folder, dist.get_world_size(), seed=1)
    run.train(1)
    run.checkpointer.load(1)
    return run.contents()


def test_a_rank_fills_one_file_after_another(ranks: RankPool, tmp_path: Path) -> None:
    limit, largest = 6_000, 8 * HIDDEN * 2 * HIDDEN * 4 // 4  # bytes; a rank of four has a quarter of any tensor
    results = ranks.run(4, save_to_small_files, str(tmp_path), limit)
    folder = tmp_path / "step-00000001"
    files = sorted(folder.glob("*.safetensors"))
    assert {path.name for path in folder.iterdir()} == {"state.json", *(path.name for path in files)}
    assert list(json.loads((folder / "state.json").read_text())["files"]) == [path.name for path in files]
    for rank in range(4):
        sizes = []
        for path in files:
            if path.name.startswith(f"shard-{rank + 1:05d}-"):
                with safe_open(path, "pt") as file:
                    names = [name for name in file.keys() if not name.startswith("random_state.")]  # noqa: SIM118
                    sizes.append(sum(file.get_tensor(name).nbytes for name in names))
        # A file ends with the tensor that fills it; the last one holds the rest, and some tensors are another rank's.
        assert len(sizes) == pytest.approx(sum(sizes) / limit, abs=1.5)
        assert len(sizes) > 2
        assert max(sizes) < limit + largest
    for world_size in (1, 2):
        assert_equal(ranks.run(world_size, load_contents, str(tmp_path))[0], results[0])


def save_interleaved(folder: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(3, 8, bias=False)
    interleaved = DTensor.from_local(torch.ones(4, 3), mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    model.weight = nn.Parameter(interleaved)
    try:
        Checkpointer(Path(folder), model, torch.optim.SGD(model.parameters()), 0).save(1, {})
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_shards_in_interleaved_parts_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(2, save_interleaved, str(tmp_path)):
        assert message.startswith("weight is sharded in interleaved parts")
    assert latest_step(tmp_path) is None
