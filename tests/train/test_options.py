"""Training options with the real trainer: what a run starts from, what is frozen, and ways to compute the same."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForCausalLM

import crossdock.parallel.fsdp as fsdp
from crossdock.checkpoint import CheckpointError
from crossdock.config import ConfigError, load_config, validate
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer
from tests.checkpoint.hf_folders import differences, mixed, read_tensors, snapshot, write_shards
from tests.ranks import RankPool
from tests.tiny import run_trainer, speeches, write_hf_model, write_speeches

EP2 = "--parallelism.expert-parallel-degree=2"
FROM_HF = "--checkpoint.initial-load-in-hf"
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` is fp32, `mixed` of several dtypes, `tied` shares its embeddings; nine experts divide over no two ranks."""
    folder = tmp_path_factory.mktemp("options")
    write_hf_model(folder / "hf", num_experts=9)
    shutil.copytree(folder / "hf", folder / "mixed")
    write_shards(folder / "mixed", mixed(read_tensors(folder / "hf")), 3)
    write_hf_model(folder / "tied", num_experts=9, tie_word_embeddings=True)
    return folder


def _settings(world_size: int, *overrides: str) -> list[str]:
    return ["--training.steps", str(STEPS), "--training.local-batch-size", str(8 // world_size), *overrides]


def _train(
    ranks: RankPool, folder: Path, name: str, *overrides: str, world_size: int = 2, assets: str = "hf"
) -> list[float]:
    """Train `STEPS` steps of 8 sequences; the losses."""
    arguments = (str(folder / assets), str(folder / name), str(folder / "cache"), _settings(world_size, *overrides))
    return [line["loss"] for line in ranks.run(world_size, run_trainer, *arguments)[0]["metrics"]]


@pytest.fixture(scope="module")
def plain(ranks: RankPool, folder: Path) -> list[float]:
    """The losses of the run `plain`: from `hf`, two ranks, ep 2, no option."""
    return _train(ranks, folder, "plain", FROM_HF, EP2)


def _build(assets: str, run_folder: str, cache: str, overrides: list[str]) -> Trainer:
    settings = ["--model.hf-assets-path", assets, "--job.dump-folder", run_folder]
    settings += ["--data.source", str(speeches(assets)), "--data.cache-folder", cache]
    config = load_config(None, [*settings, "--training.seq-len", "32", *overrides])
    dims = validate(config, dist.get_world_size())
    return Trainer(config, dims, torch.device("cpu"), dist.get_rank() == 0, StopSignal())


def batches_at(assets: str, run_folder: str, cache: str, overrides: list[str], samples: int) -> list[np.ndarray]:
    """This rank's tokens and labels of the step after `samples` samples, each `[2, B, S]`."""
    batches = _build(assets, run_folder, cache, overrides).batches.at(samples)
    return [np.stack([batch.input_ids.numpy(), batch.labels.numpy()]) for batch in batches]


@pytest.fixture(scope="module")
def steps(ranks: RankPool, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels `[8, S]` of the first steps of every run."""
    arguments = (str(folder / "hf"), str(folder / "unused"), str(folder / "cache"), _settings(1))
    batches = [ranks.run(1, batches_at, *arguments, 8 * step)[0] for step in range(STEPS)]
    return [tuple(torch.from_numpy(both) for both in batch[0]) for batch in batches]  # type: ignore[misc]


@torch.no_grad()
def _transformers_loss(hf_folder: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    logits = model(input_ids=batch[0]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), ignore_index=-100).item()


@pytest.mark.parametrize("assets", ["hf", "mixed", "tied"])
@pytest.mark.parametrize(
    ("world_size", "options"),
    [pytest.param(1, (), marks=pytest.mark.slow), pytest.param(2, (), marks=pytest.mark.slow), (2, (EP2,))],
)
def test_the_first_loss_is_that_of_transformers(
    ranks: RankPool, folder: Path, steps: list[Any], assets: str, world_size: int, options: tuple[str, ...]
) -> None:
    name = f"first-{assets}-{world_size}-{len(options)}"
    losses = _train(ranks, folder, name, FROM_HF, *options, world_size=world_size, assets=assets)
    assert losses[0] == pytest.approx(_transformers_loss(folder / assets, steps[0]), rel=1e-5)
    assert losses[-1] < losses[0]


def test_drawn_weights_are_not_those_of_the_folder(ranks: RankPool, folder: Path, steps: list[Any]) -> None:
    losses = _train(ranks, folder, "drawn")
    assert abs(losses[0] - _transformers_loss(folder / "hf", steps[0])) > 1e-3


@pytest.mark.parametrize("assets", ["hf", "tied"])
def test_what_is_exported_is_what_a_resumed_run_goes_on_with(
    ranks: RankPool, folder: Path, steps: list[Any], assets: str
) -> None:
    half, whole = f"half-{assets}", f"whole-{assets}"
    options = (FROM_HF, EP2, "--lr-scheduler.decay-ratio=0", "--lr-scheduler.warmup-steps=0")
    _train(ranks, folder, half, "--training.steps=2", *options, assets=assets)
    expected = _transformers_loss(folder / half / "hf", steps[2])
    shutil.move(folder / assets / "model.safetensors", folder / "aside")
    try:  # Initial weights are not wanted again.
        resumed = _train(ranks, folder, half, *options, assets=assets)
    finally:
        shutil.move(folder / "aside", folder / assets / "model.safetensors")
    assert resumed[2] == pytest.approx(expected, rel=1e-5)
    assert resumed == _train(ranks, folder, whole, *options, assets=assets)
    assert differences(read_tensors(folder / half / "hf"), read_tensors(folder / whole / "hf")) == []


@pytest.mark.parametrize("kind", ["run", "checkpoint", "exported"])
def test_a_run_starts_from_another_run(
    ranks: RankPool, folder: Path, plain: list[float], steps: list[Any], kind: str
) -> None:
    before = snapshot(folder / "plain")
    path = {"run": "plain", "checkpoint": f"plain/checkpoint/step-{STEPS:08d}", "exported": "plain/hf"}[kind]
    option = f"--checkpoint.initial-load-path={folder / path}"
    losses = _train(ranks, folder, f"from-{kind}", option, world_size=1)
    assert losses[0] == pytest.approx(_transformers_loss(folder / "plain" / "hf", steps[0]), rel=1e-5)
    assert losses[0] < plain[0] - 0.1
    assert snapshot(folder / "plain") == before


def train_without_source(assets: str, run_folder: str, cache: str, overrides: list[str]) -> None:
    """The folder that a run starts from vanishes as soon as it has started."""
    trainer = _build(assets, run_folder, cache, overrides)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(assets)
    trainer.train()


def test_the_source_may_vanish_and_the_export_is_the_same_model(ranks: RankPool, folder: Path, tmp_path: Path) -> None:
    original = read_tensors(folder / "mixed")
    write_speeches(speeches(tmp_path / "source"))
    for world_size, options in ((1, []), (2, []), (2, [EP2])):
        source, run = tmp_path / "source", tmp_path / f"run-{world_size}-{len(options)}"
        shutil.copytree(folder / "mixed", source)
        settings = _settings(world_size, FROM_HF, "--optimizer.lr=0", *options)
        ranks.run(world_size, train_without_source, str(source), str(run), str(folder / "cache"), settings)
        assert not source.exists()
        exported = read_tensors(run / "hf")
        assert exported.keys() == original.keys()
        for name, tensor in original.items():
            # A step of no length may turn a negative zero into a positive one, and no more.
            assert exported[name].dtype == tensor.dtype
            assert torch.equal(exported[name], tensor), name
        assert AutoModelForCausalLM.from_pretrained(run / "hf", dtype="auto").dtype == torch.bfloat16


def _is_router(name: str) -> bool:
    return name.endswith(".mlp.gate.weight")


def _is_expert(name: str) -> bool:
    return ".mlp.experts." in name


@pytest.mark.parametrize("frozen", ["router", "experts", pytest.param("router experts", marks=pytest.mark.slow)])
def test_what_is_frozen_stays_and_all_else_moves(
    ranks: RankPool, folder: Path, plain: list[float], frozen: str
) -> None:
    name = "frozen-" + frozen.replace(" ", "-")
    options = [FROM_HF, EP2, *(f"--training.freeze-{part}" for part in frozen.split())]
    losses = _train(ranks, folder, name, "--checkpoint.interval=2", *options)
    before, after = read_tensors(folder / "hf"), read_tensors(folder / name / "hf")
    stays = {
        key for key in before if ("router" in frozen and _is_router(key)) or ("experts" in frozen and _is_expert(key))
    }
    assert len(stays) == ("router" in frozen) * 2 + ("experts" in frozen) * 2 * 9 * 3
    assert set(differences(after, before)) == before.keys() - stays
    assert losses[0] == plain[0]
    assert losses[-1] != plain[-1]
    shutil.rmtree(folder / name / "checkpoint" / f"step-{STEPS:08d}")
    assert _train(ranks, folder, name, *options) == losses, "the resumed run is another"
    assert differences(read_tensors(folder / name / "hf"), after) == []


def count_offloaded(assets: str, run_folder: str, cache: str, overrides: list[str]) -> int:
    """How many modules hand FSDP's offload to torch. On CPU there is nothing else that could be seen of it."""
    with mock.patch.object(fsdp, "fully_shard", wraps=fsdp.fully_shard) as shard:
        _build(assets, run_folder, cache, overrides)
    policies = [call.kwargs["offload_policy"] for call in shard.call_args_list]
    offloaded = sum(isinstance(policy, CPUOffloadPolicy) for policy in policies)
    assert offloaded in (0, len(policies))
    return offloaded


def test_offload_reaches_every_module(ranks: RankPool, folder: Path) -> None:
    for name, options, offloads in (("on", ["--training.enable-cpu-offload"], True), ("off", [], False)):
        arguments = (str(folder / "hf"), str(folder / f"offload-{name}"), str(folder / "cache"), _settings(2, *options))
        assert [count > 0 for count in ranks.run(2, count_offloaded, *arguments)] == [offloads] * 2


def test_offload_to_the_machines_memory_changes_no_number(ranks: RankPool, folder: Path, plain: list[float]) -> None:
    offload = "--training.enable-cpu-offload"
    assert _train(ranks, folder, "offload", FROM_HF, EP2, offload, "--checkpoint.interval=2") == plain
    assert differences(read_tensors(folder / "offload" / "hf"), read_tensors(folder / "plain" / "hf")) == []
    shutil.rmtree(folder / "offload" / "checkpoint" / f"step-{STEPS:08d}")
    for name, options in (("offload", []), ("offload-again", [offload])):
        if options:
            shutil.copytree(folder / "offload", folder / name)
            shutil.rmtree(folder / name / "checkpoint" / f"step-{STEPS:08d}")
        assert _train(ranks, folder, name, FROM_HF, EP2, *options) == plain, "a checkpoint knows nothing of offload"


def train_compiled(assets: str, run_folder: str, cache: str, overrides: list[str]) -> tuple[list[float], int]:
    """The losses, and how many pieces of code were compiled."""
    torch._dynamo.reset()
    counters["frames"].clear()
    result = run_trainer(assets, run_folder, cache, overrides)
    return [line["loss"] for line in result["metrics"]], counters["frames"]["ok"]


def _check_compiled(ranks: RankPool, folder: Path, plain: list[float], mode: str, backend: str) -> None:
    name = f"{backend}-{mode}"
    options = ("--compile.enable", f"--compile.backend={backend}", f"--activation-checkpoint.mode={mode}")
    arguments = (str(folder / "hf"), str(folder / name), str(folder / "cache"), _settings(2, FROM_HF, EP2, *options))
    for losses, compiled in ranks.run(2, train_compiled, *arguments):
        assert compiled > 0
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_blocks_give_the_same_losses(ranks: RankPool, folder: Path, plain: list[float], mode: str) -> None:
    _check_compiled(ranks, folder, plain, mode, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_inductor_gives_the_same_losses(ranks: RankPool, folder: Path, plain: list[float], mode: str) -> None:
    _check_compiled(ranks, folder, plain, mode, "inductor")


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_blocks_give_the_same_losses(ranks: RankPool, folder: Path, plain: list[float], mode: str) -> None:
    losses = _train(ranks, folder, f"recomputed-{mode}", FROM_HF, EP2, f"--activation-checkpoint.mode={mode}")
    np.testing.assert_allclose(losses, plain, rtol=1e-6)


def test_eager_attention_gives_the_same_losses(ranks: RankPool, folder: Path, plain: list[float]) -> None:
    losses = _train(ranks, folder, "eager", FROM_HF, EP2, "--model.attn-implementation=eager")
    assert losses != plain, "the option does nothing"
    np.testing.assert_allclose(losses, plain, rtol=1e-5)


def _refusal(folder: Path, *overrides: str) -> ConfigError:
    settings = ["--model.hf-assets-path", str(folder / "hf"), "--training.seq-len=32", *overrides]
    with pytest.raises(ConfigError) as caught:
        validate(load_config(None, settings), 2)
    return caught.value


def test_liger_is_refused_without_its_package_and_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[importlib.machinery.ModuleSpec | None] = [None]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: found[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal = _refusal(folder, "--model.kernels=liger")
    assert (refusal.field, refusal.value) == ("model.kernels", "liger")
    assert "pip install 'crossdock[liger]'" in refusal.valid
    found[0] = importlib.machinery.ModuleSpec("liger_kernel", None)
    assert "needs a GPU" in _refusal(folder, "--model.kernels=liger").valid
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refusal = _refusal(folder, "--model.kernels=liger", "--training.dtype=float64")
    assert "float64" in refusal.valid


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_is_refused_without_its_package_and_without_a_gpu(
    folder: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[importlib.machinery.ModuleSpec | None] = [None]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: found[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    option = f"--model.attn-implementation={attention}"
    refusal = _refusal(folder, option)
    assert (refusal.field, refusal.value) == ("model.attn_implementation", attention)
    if attention != "flex_attention":
        assert "needs the package flash_attn" in refusal.valid
        found[0] = importlib.machinery.ModuleSpec("flash_attn", None)
        assert "training.dtype = bfloat16" in _refusal(folder, option).valid
    assert "needs a GPU" in _refusal(folder, option, "--training.dtype=bfloat16").valid


def start_from(assets: str, run_folder: str, cache: str, overrides: list[str]) -> str:
    try:
        _build(assets, run_folder, cache, overrides)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_run_of_another_shape_is_refused_on_all_ranks(ranks: RankPool, folder: Path, plain: list[float]) -> None:
    settings = [f"--checkpoint.initial-load-path={folder / 'plain'}", "--moe.expert-bias"]
    arguments = (str(folder / "hf"), str(folder / "refused"), str(folder / "cache"), _settings(2, *settings))
    for message in ranks.run(2, start_from, *arguments):
        assert "expert_bias is missing" in message
    assert not (folder / "refused" / "checkpoint").exists()


def test_what_compiled_blocks_compute_cannot_be_kept_selectively(folder: Path) -> None:
    error = _refusal(folder, "--compile.enable", "--activation-checkpoint.mode=selective")
    assert (error.field, error.value) == ("activation_checkpoint.mode", "selective")
    assert "full or none" in error.valid


def test_an_unknown_compiler_is_refused_with_those_there_are(folder: Path) -> None:
    error = _refusal(folder, "--compile.enable", "--compile.backend=nosuch")
    assert error.field == "compile.backend"
    assert "inductor" in error.valid
