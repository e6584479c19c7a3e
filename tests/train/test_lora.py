"""LoRA runs with the real trainer: from weights, resumed, exported, merged, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from crossdock.checkpoint import CheckpointError
from crossdock.config import ConfigError, load_config, validate
from crossdock.tools.convert import ConvertOptions, plan_conversion
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer
from tests.blocks import commands_of
from tests.checkpoint.hf_folders import differences, read_tensors
from tests.ranks import RankPool
from tests.tiny import by_hand, run_trainer, speeches, write_hf_model

EP2 = "--parallelism.expert-parallel-degree=2"
FROM_HF = "--checkpoint.initial-load-in-hf"
LORA = ("--lora.rank=4", "--lora.alpha=8", "--optimizer.lr=1e-2", "--lr-scheduler.warmup-steps=0")
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` is what runs start from; nine experts divide over no two ranks."""
    folder = tmp_path_factory.mktemp("lora")
    write_hf_model(folder / "hf", num_experts=9)
    return folder


def _settings(world_size: int, *overrides: str) -> list[str]:
    return ["--training.steps", str(STEPS), "--training.local-batch-size", str(8 // world_size), *overrides]


def _train(
    ranks: RankPool, folder: Path, name: str, *overrides: str, world_size: int = 2, assets: str = "hf"
) -> dict[str, Any]:
    arguments = (str(folder / assets), str(folder / name), str(folder / "cache"), _settings(world_size, *overrides))
    return ranks.run(world_size, run_trainer, *arguments)[0]


def _losses(result: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in result["metrics"]]


@pytest.fixture(scope="module")
def run(ranks: RankPool, folder: Path) -> dict[str, Any]:
    """The run `run`: on two ranks, ep 2, a checkpoint every second step."""
    return _train(ranks, folder, "run", FROM_HF, *LORA, EP2, "--checkpoint.interval=2", "--moe.expert-bias")


def _without_last_step(folder: Path, name: str, copy: str) -> None:
    shutil.copytree(folder / name, folder / copy)
    shutil.rmtree(folder / copy / "checkpoint" / f"step-{STEPS:08d}")


def test_a_run_learns_and_its_checkpoints_hold_adapters_alone(folder: Path, run: dict[str, Any]) -> None:
    losses = _losses(run)
    assert losses[-1] < losses[0] - 0.1
    assert (run["bias"] == 0).all(), "the expert bias is not an adapter"
    names: set[str] = set()
    step = folder / "run" / "checkpoint" / f"step-{STEPS:08d}"
    for path in step.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {name for name in file.keys() if not name.startswith("random_state.")}  # noqa: SIM118
    assert {name.partition(".")[0] for name in names} == {"model", "optimizer"}
    assert all("lora_" in name for name in names)
    # Four linear layers and nine experts' two matrices in each of two layers; an adapter has two.
    assert len([name for name in names if name.startswith("model.")]) == 2 * (4 * 2 + 9 * 2 * 2)
    assert not (folder / "run" / "hf").exists()


def test_layouts_give_the_same_losses(ranks: RankPool, folder: Path, run: dict[str, Any]) -> None:
    for world_size in (1, 2):
        other = _train(ranks, folder, f"ep1-{world_size}", FROM_HF, *LORA, "--moe.expert-bias", world_size=world_size)
        np.testing.assert_allclose(_losses(other), _losses(run), rtol=1e-4)


def test_ways_to_compute_change_no_number(ranks: RankPool, folder: Path, run: dict[str, Any]) -> None:
    ways = {
        "recomputed": "--activation-checkpoint.mode=selective",
        "static": "--moe.static-shapes",
    }
    for name, option in ways.items():
        other = _train(ranks, folder, name, FROM_HF, *LORA, EP2, "--moe.expert-bias", option)
        np.testing.assert_allclose(_losses(other), _losses(run), rtol=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one(ranks: RankPool, folder: Path, run: dict[str, Any]) -> None:
    options = (FROM_HF, *LORA, "--moe.expert-bias")
    _without_last_step(folder, "run", "same")
    assert _losses(_train(ranks, folder, "same", *options, EP2)) == _losses(run)
    _without_last_step(folder, "run", "other")
    other = _train(ranks, folder, "other", *options, "--parallelism.expert-parallel-degree=1", world_size=1)
    np.testing.assert_allclose(_losses(other), _losses(run), rtol=1e-4)


def test_peft_and_the_merged_model_give_the_same_logits(
    folder: Path, run: dict[str, Any], only_rank: Callable[..., int], tmp_path: Path
) -> None:
    assert only_rank("export", folder / "run", tmp_path / "adapter") == 0
    assert only_rank("export", folder / "run", tmp_path / "merged", "--merge") == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (folder / "run" / "adapter" / name).read_bytes()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "hf")
    base, ids = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32), torch.arange(3, 40)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=0, atol=1e-5)
    assert (adapted - before).abs().max() > 0.1
    changed = differences(read_tensors(tmp_path / "merged"), read_tensors(folder / "hf"))
    assert all("self_attn" in name or ".experts." in name for name in changed)
    assert len(changed) == 2 * (4 + 9 * 3)


def test_text_and_perplexity_are_those_of_the_merged_model(
    folder: Path, run: dict[str, Any], only_rank: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert only_rank("export", folder / "run", tmp_path / "merged", "--merge") == 0
    (tmp_path / "text.txt").write_text("Fellow citizens of the Senate. " * 8)
    said = {}
    for model in (folder / "run", tmp_path / "merged", folder / "hf"):
        capsys.readouterr()
        evaluate = ("--data", tmp_path / "text.txt", "--seq-len", "32", "--cache-folder", tmp_path / "cache")
        assert only_rank("eval", model, *evaluate) == 0
        assert only_rank("generate", model, "--prompt", "Fellow", "--max-new-tokens", "5") == 0
        said[model.name] = capsys.readouterr().out
    assert said["run"] == said["merged"] != said["hf"]


def test_a_run_starts_from_an_adapter(
    ranks: RankPool, folder: Path, run: dict[str, Any], only_rank: Callable[..., int]
) -> None:
    assert only_rank("export", folder / "run", folder / "merged", "--merge") == 0
    merged = _train(ranks, folder, "from-merged", FROM_HF, *LORA, EP2, *_start(folder / "merged"))
    adapter = f"--lora.adapter-path={folder / 'run' / 'adapter'}"
    again = _train(ranks, folder, "from-adapter", FROM_HF, *LORA, EP2, adapter)
    assert _losses(again)[0] == pytest.approx(_losses(merged)[0], rel=1e-5)
    assert _losses(again)[0] < _losses(run)[0] - 0.1


def _start(path: Path) -> tuple[str, ...]:
    return (f"--checkpoint.initial-load-path={path}",)


def test_a_run_stands_on_a_checkpoint_of_another_that_goes_on(ranks: RankPool, folder: Path) -> None:
    two = ("--training.steps=2", "--checkpoint.interval=1", "--checkpoint.keep-latest-k=0")
    _train(ranks, folder, "ground", FROM_HF, EP2, *two)
    start = _start(folder / "ground")
    whole = _train(ranks, folder, "upon", *LORA, EP2, *start, "--checkpoint.interval=2")
    _train(ranks, folder, "ground", FROM_HF, EP2, *two, "--training.steps=3")
    _without_last_step(folder, "upon", "upon-again")
    pinned = _start(folder / "ground" / "checkpoint" / "step-00000002")
    assert _losses(_train(ranks, folder, "upon-again", *LORA, EP2, *pinned)) == _losses(whole)
    error = _refusal(folder, *LORA, *start, f"--job.dump-folder={folder / 'upon'}")
    assert error.field == "checkpoint.initial_load_path"
    assert "step-00000002" in error.valid


def _refusal(folder: Path, *overrides: str) -> ConfigError:
    settings = ["--model.hf-assets-path", str(folder / "hf"), "--training.seq-len=32"]
    settings += ["--data.source", str(speeches(folder / "hf")), "--training.global-batch-size=8"]
    with pytest.raises(ConfigError) as caught:
        validate(load_config(None, [*settings, *overrides]), 2)
    return caught.value


MISTAKES = [
    (["--lora.rank=4"], "lora.rank", "initial_load_in_hf"),
    ([FROM_HF, "--lora.rank=-1"], "lora.rank", "0 or more"),
    ([FROM_HF, "--lora.rank=4", "--lora.alpha=0"], "lora.alpha", "positive"),
    ([FROM_HF, "--lora.rank=4", "--lora.targets="], "lora.targets", "attention, experts or both"),
    ([FROM_HF, "--lora.rank=4", "--lora.targets=mlp"], "lora.targets", "attention"),
    ([FROM_HF, "--lora.rank=4", "--model.name=generic"], "lora.targets", "generic"),
    ([FROM_HF, "--lora.rank=4", "--training.freeze-router"], "training.freeze_router", "leaves all weights"),
    ([FROM_HF, "--lora.rank=4", "--training.freeze-experts"], "training.freeze_experts", "leaves all weights"),
    ([FROM_HF, "--lora.adapter-path=HF"], "lora.adapter_path", "needs lora.rank"),
    ([FROM_HF, "--lora.rank=4", "--lora.adapter-path=HF"], "lora.adapter_path", "no adapter in PEFT's format"),
    ([FROM_HF, *LORA, "--lora.rank=2", "--lora.adapter-path=RUN/adapter"], "lora.adapter_path", "has r 4, not 2"),
    ([FROM_HF, *LORA, "--lora.targets=experts", "--lora.adapter-path=RUN/adapter"], "lora.adapter_path", "unexpected"),
    (["--checkpoint.initial-load-path=RUN"], "checkpoint.initial_load_path", "adapters alone"),
    ([*LORA, "--checkpoint.initial-load-path=RUN"], "checkpoint.initial_load_path", "export --merge"),
    ([FROM_HF, "--lora.rank=8", "--job.dump-folder=RUN"], "lora.rank", "must be 4"),
]


def test_a_run_is_not_converted_but_exported(folder: Path, run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"hold adapters alone; crossdock export .* --merge"):
        plan_conversion(folder / "run", folder / "converted", ConvertOptions())


@pytest.mark.parametrize(("overrides", "field", "valid"), MISTAKES, ids=[" ".join(mistake[0]) for mistake in MISTAKES])
def test_a_mistake_is_refused(folder: Path, run: dict[str, Any], overrides: list[str], field: str, valid: str) -> None:
    named = [word.replace("HF", str(folder / "hf")).replace("RUN", str(folder / "run")) for word in overrides]
    error = _refusal(folder, *named)
    assert error.field == field
    assert valid in error.valid


def test_a_base_that_is_gone_is_named(
    folder: Path, run: dict[str, Any], tmp_path: Path, only_rank: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    path.write_text(by_hand(path.read_text().replace(str(folder / "hf"), str(tmp_path / "gone"))))
    with pytest.raises(ConfigError) as caught:
        validate(load_config(None, [f"--job.dump-folder={tmp_path / 'run'}"]), 2)
    assert str(tmp_path / "gone") in str(caught.value)
    assert "adapters of this run" in caught.value.valid
    assert only_rank("eval", tmp_path / "run", "--data", "x.txt") == 2
    assert "gone" in "".join(capsys.readouterr().err.split())
    # Where the weights are now may be said.
    moved = _start(folder / "hf")
    assert validate(load_config(None, [f"--job.dump-folder={tmp_path / 'run'}", *moved]), 2).world_size == 2


def resume(assets: str, run_folder: str, cache: str, overrides: list[str]) -> str:
    settings = ["--model.hf-assets-path", assets, "--job.dump-folder", run_folder, "--data.cache-folder", cache]
    settings += ["--data.source", str(speeches(assets)), "--training.seq-len=32", *overrides]
    config = load_config(None, settings)
    dims = validate(config, dist.get_world_size())
    try:
        Trainer(config, dims, torch.device("cpu"), dist.get_rank() == 0, StopSignal())
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_resume_that_would_load_nothing_is_an_error(ranks: RankPool, folder: Path, run: dict[str, Any]) -> None:
    """The checkpoint of a run without LoRA, and one with other adapters, in the place of its own."""
    _train(ranks, folder, "full", FROM_HF, EP2, "--moe.expert-bias", "--training.steps=1")
    _train(ranks, folder, "narrow", FROM_HF, EP2, *LORA, "--lora.targets=attention", "--training.steps=1")
    for name, message in (("full", "lora_a.0 is missing"), ("narrow", "lora_a.0 is missing")):
        broken = folder / f"broken-{name}"
        shutil.copytree(folder / "run", broken)
        shutil.rmtree(broken / "checkpoint")
        shutil.copytree(folder / name / "checkpoint", broken / "checkpoint")
        options = _settings(2, FROM_HF, EP2, *LORA, "--moe.expert-bias")
        for said in ranks.run(2, resume, str(folder / "hf"), str(broken), str(folder / "cache"), options):
            assert message in said
            assert "cannot load checkpoint" in said


SECTION = (
    (Path(__file__).parents[2] / "docs" / "finetune.md").read_text().partition("\n## LoRA\n")[2].partition("\n## ")[0]
)
COMMANDS = [command.removeprefix("crossdock ") for command in commands_of("docs/finetune.md", text=SECTION)]


@pytest.fixture
def as_in_the_docs(folder: Path, run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, there in (("Qwen3-30B-A3B", "hf"), ("RUN", "run"), ("speeches", "speeches")):
        (tmp_path / name).symlink_to(folder / there)
    (tmp_path / "speech.txt").write_text("Fellow citizens of the Senate and of the House of Representatives. " * 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_docs_work(as_in_the_docs: Path, only_rank: Callable[..., int], command: str) -> None:
    arguments = shlex.split(command)
    # Smaller, not other, work.
    if arguments[0] == "train":
        arguments[arguments.index("--training.steps") + 1] = "1"
        arguments += ["--training.seq-len", "32", "--data.source", "speeches", "--data.cache-folder", "cache"]
    more = {"generate": ["--max-new-tokens", "3"], "eval": ["--seq-len", "32", "--cache-folder", "cache"]}
    assert only_rank(*arguments, *more.get(arguments[0], [])) == 0


def test_the_program_of_the_docs_works(as_in_the_docs: Path) -> None:
    assert {command.split()[0] for command in COMMANDS} == {"train", "generate", "eval", "export"}
    (program,) = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert isinstance(names["model"], PeftModel)
