"""The commands that README.md and some pages of docs show do what they say, on a tiny model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets

ROOT = Path(__file__).parent.parent
TEXT = "".join(
    (ROOT / path).read_text() for path in ("README.md", "docs/models.md", "docs/checkpoints.md", "docs/numbers.md")
)
COMMANDS = re.findall(r"^    (?:\.venv/bin/)?crossdock (.+)$", TEXT, re.MULTILINE)
RUN = "runs/debug/20261121-101622"
TITAN = "torchtitan/step-1000"
DENSE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_assets(folder / "assets")
    arguments = (str(folder / "assets"), str(folder / RUN), str(folder / "cache"))
    ranks.run(1, run_trainer, *arguments, ["--training.steps", "1"])
    titan = AutoModelForCausalLM.from_pretrained(folder / RUN / "hf").state_dict()
    dcp.save(titan, checkpoint_id=folder / TITAN, no_dist=True)
    Qwen3ForCausalLM(Qwen3Config(**DENSE)).save_pretrained(folder / "Qwen3-1.7B")
    (folder / "speech.txt").write_text("Fellow citizens of the Senate and of the House of Representatives. " * 3)
    return folder


def test_there_are_commands() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"train", "generate", "eval", "export", "convert", "report"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_works(
    folder: Path, tmp_path: Path, only_rank: Callable[..., int], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for name in ("runs", "speech.txt", "torchtitan", "Qwen3-1.7B"):
        (tmp_path / name).symlink_to(folder / name)
    for name in ("Qwen3-30B-A3B", "granite-3.1-1b-a400m-base"):  # the generic adapter takes any family
        (tmp_path / name).symlink_to(folder / RUN / "hf")
    monkeypatch.chdir(tmp_path)
    arguments = [RUN if word == "MODEL" else word for word in shlex.split(command)]
    # Smaller, not other, work.
    if arguments[0] == "train":
        arguments[arguments.index("--training.steps") + 1] = "1"
        arguments += ["--training.seq-len", "32", "--data.cache-folder", str(folder / "cache")]
    if arguments[0] == "generate":
        arguments += ["--max-new-tokens", "3"]
    if arguments[0] == "eval":
        arguments = [*(word for word in arguments if word not in ("--seq-len", "1024")), "--cache-folder", "cache"]
    assert only_rank(*arguments) == 0
    if arguments[0] == "export" or (arguments[0] == "convert" and arguments[2] != "converted"):
        AutoModelForCausalLM.from_pretrained(tmp_path / arguments[2])
