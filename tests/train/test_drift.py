"""What ranks should hold alike is compared by its bits; what differs is named (docs/numbers.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.config import load_config, validate
from crossdock.parallel import local_part
from crossdock.train.drift import digest
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer, TrainingStopped
from tests.ranks import RankPool
from tests.tiny import speeches, write_assets

EP = ["--parallelism.expert-parallel-degree", "2"]
REPLICAS = ["--parallelism.data-parallel-replicate-degree", "2", *EP]
MUON = ["--optimizer.name", "muon"]


def flip(tensor: Tensor, place: int, bit: int) -> None:
    """One bit of this rank's part of a tensor."""
    local = local_part(tensor.detach())
    words = local.view({4: torch.int32, 8: torch.int64}[local.element_size()])
    words.view(-1)[place] ^= 1 << bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_digest_is_of_bits_and_of_their_places(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(3, 700_001) * 3).to(dtype)  # more than a block
    before = int(digest(tensor))
    assert int(digest(tensor.clone())) == before
    raw = tensor.view(torch.uint8).flatten()
    for place in (0, 1, len(raw) // 2, len(raw) - 1):
        raw[place] ^= 1
        assert int(digest(tensor)) != before
        raw[place] ^= 1
    assert int(digest(tensor)) == before
    assert int(digest(tensor.flip(0))) != before
    assert int(digest(tensor.view(-1)[:-1])) != before


def test_a_digest_tells_zero_from_minus_zero_and_one_nan_from_another() -> None:
    zeros = torch.zeros(5)
    assert int(digest(zeros)) != int(digest(-zeros))
    nan = torch.full((5,), torch.nan)
    other = nan.clone()
    flip(other, 2, 0)
    assert other.isnan().all()
    assert int(digest(nan)) != int(digest(other))
    assert int(digest(nan)) == int(digest(nan.clone()))


def _trainer(assets: str, folder: str, cache: str, settings: list[str]) -> Trainer:
    fixed = ["--model.hf-assets-path", assets, "--job.dump-folder", folder, "--training.tuned", "off"]
    fixed += ["--data.source", str(speeches(assets)), "--data.cache-folder", cache, "--training.seq-len", "32"]
    fixed += ["--training.steps", "3", "--training.local-batch-size", "2", "--checkpoint.no-last-save-in-hf"]
    config = load_config(None, [*fixed, "--moe.expert-bias", *settings])
    dims = validate(config, dist.get_world_size())
    return Trainer(config, dims, torch.device("cpu"), dist.get_rank() == 0, StopSignal())


def _places(trainer: Trainer) -> dict[str, Tensor]:
    """A dense parameter, an expert's, an expert bias, moments of both."""
    model, optimizer = trainer.model, trainer.optimizer
    parameters = dict(model.named_parameters())
    dense = parameters["model.layers.0.self_attn.q_proj.weight"]
    experts = next(parameter for name, parameter in parameters.items() if name.endswith("experts.down_projs"))
    bias = trainer.layers[1].router.expert_bias  # type: ignore[union-attr]
    assert bias is not None
    key = "momentum_buffer" if "momentum_buffer" in optimizer.state[dense] else "exp_avg_sq"
    return {
        "model.layers.0.self_attn.q_proj.weight": dense,
        "model.layers.0.mlp.experts.down_projs": experts,
        "model.layers.1.mlp.router.expert_bias": bias,
        f"{key} of model.layers.0.self_attn.q_proj.weight": optimizer.state[dense][key],
        f"{key} of model.layers.0.mlp.experts.down_projs": optimizer.state[experts][key],
        "model.norm.weight": parameters["model.norm.weight"],
    }


def _find_flips(assets: str, folder: str, cache: str, settings: list[str], rank: int) -> dict[str, list[str]]:
    """What is found where `rank` has one bit of a tensor flipped, in turn; of a run of some steps, before and after."""
    trainer = _trainer(assets, folder, cache, settings)
    found = {"at the start": [str(each) for each in trainer.replicas.differences()]}
    trainer.train()
    found["after steps"] = [str(each) for each in trainer.replicas.differences()]
    for index, (name, tensor) in enumerate(_places(trainer).items()):
        for _ in range(2):  # The second time puts it back.
            if dist.get_rank() == rank:
                flip(tensor, -1, 3 * index)
            found.setdefault(name, []).extend(map(str, trainer.replicas.differences()))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    write_assets(folder / "assets")
    return folder


def test_one_flipped_bit_on_one_rank_is_found_and_named(ranks: RankPool, folder: Path) -> None:
    arguments = (str(folder / "assets"), str(folder / "flips"), str(folder / "cache"))
    results = ranks.run(4, _find_flips, *arguments, REPLICAS, 3)
    assert all(result == results[0] for result in results), "all ranks say the same"
    found = results[0]
    assert found.pop("at the start") == found.pop("after steps") == []
    for tensor, said in found.items():
        if "expert_bias" in tensor:
            assert said == [f"{tensor} of rank 3 differs from that of ranks 0, 1, 2"]
        else:
            assert said == [f"{tensor} differs between rank 1 and rank 3"]
    assert len(found) == 6


TP = ["--parallelism.tensor-parallel-degree", "2"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([*TP, *EP], id="tp"),
        pytest.param([*TP, "--parallelism.no-sequence-parallel", *MUON], id="tp-whole-sequences-muon"),
        pytest.param(["--parallelism.pipeline-parallel-degree", "2", *EP], id="pp"),
        pytest.param([*REPLICAS, *MUON], id="replicas-muon"),
        pytest.param(["--parallelism.data-parallel-replicate-degree", "4"], id="replicas-4"),
        pytest.param(["--parallelism.context-parallel-degree", "2", *EP], id="cp"),
    ],
)
def test_nothing_differs_in_a_run_on_any_layout(
    ranks: RankPool, folder: Path, settings: list[str], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    arguments = (str(folder / "assets"), str(folder / name), str(folder / "cache"), settings)
    assert ranks.run(4, _run_checked, *arguments) == [""] * 4


def _run_checked(assets: str, folder: str, cache: str, settings: list[str], spoil_step: int = 0) -> str:
    """Train, with a look after each step; the message that ended the run. One rank's replica is spoiled in a step."""
    trainer = _trainer(assets, folder, cache, [*settings, "--fault-tolerance.replica-check-interval", "1"])

    def spoil(*_: Any) -> None:
        if trainer.step + 1 == spoil_step and dist.get_rank() == 2:
            flip(trainer.optimizer.state[next(iter(trainer.optimizer.state))]["exp_avg"], 0, 7)

    trainer.model.register_forward_pre_hook(spoil)
    try:
        trainer.train()
    except TrainingStopped as stopped:
        return str(stopped)
    return ""


def test_drift_ends_the_run_on_all_ranks_with_what_to_do(ranks: RankPool, folder: Path) -> None:
    arguments = (str(folder / "assets"), str(folder / "spoiled"), str(folder / "cache"), REPLICAS, 3)
    messages = ranks.run(4, _run_checked, *arguments)
    assert len(set(messages)) == 1
    for words in ("step 3: ", "exp_avg of model.", "between rank 0 and rank 2", "after step 2, when all were alike"):
        assert words in messages[0]
