"""docs/finetune.md and examples/finetune: the commands, settings, program and messages are as they are written."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crossdock.config import check_settings, load_config
from crossdock.data import DataConfig, DataError, prepare_tokens
from tests.blocks import commands_of

ROOT = Path(__file__).parent.parent
EXAMPLE = (ROOT / "examples" / "finetune" / "README.md").read_text()
PAGE = (ROOT / "docs" / "finetune.md").read_text().partition("\n## LoRA\n")[0]  # which tests/train/test_lora.py runs


def _run(only_rank: Callable[..., int], monkeypatch: pytest.MonkeyPatch, text: str, *training: str) -> None:
    """Every command of a page, in turn, on one rank."""
    for line in commands_of("docs/finetune.md", "crossdock|python", text=text):
        program, *arguments = shlex.split(line)
        if program == "python":
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
            continue
        if arguments[0] == "train":
            arguments += ["--data.cache-folder", "cache", *training]
        if arguments[0] == "eval":
            arguments += ["--cache-folder", "cache"]
        assert only_rank(*arguments) == 0, line


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_page_work(
    root: Path, only_rank: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(only_rank, monkeypatch, PAGE, "--training.steps", "2")
    assert "loss" in capsys.readouterr().out
    for block in re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        (root / "some.toml").write_text(block)
        check_settings(load_config(root / "some.toml"))


@pytest.mark.parametrize("steps", ["2", pytest.param("100", marks=pytest.mark.slow)])
def test_the_example_works_and_learns(
    root: Path,
    only_rank: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    steps: str,
) -> None:
    _run(only_rank, monkeypatch, EXAMPLE, "--training.steps", steps, "--training.local-batch-size", "4")
    (program,) = re.findall(r"^```python\n(.*?)^```", EXAMPLE, re.MULTILINE | re.DOTALL)
    exec(compile(program, "examples/finetune/README.md", "exec"), {})
    (answer,) = re.findall(r"^(A place .*)$", EXAMPLE, re.MULTILINE)
    assert (capsys.readouterr().out.count(answer) == 2) == (steps == "100")
    losses = [json.loads(line)["loss"] for line in (root / "runs/finetune/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_the_messages_are_those(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_model.py", "model"])
    runpy.run_path("examples/finetune/make_model.py", run_name="__main__")
    refusing = "{%- if messages | length > 2 %}{{ raise_exception('Roles must alternate.') }}{%- endif %}"
    template = root / "model" / "chat_template.jinja"
    template.write_text(refusing + template.read_text())
    user = {"role": "user", "content": "a"}
    good = [user, {"role": "assistant", "content": "b"}]
    faulty = ([{"content": "a"}], [user], [user, *good])
    messages = re.findall(r"^(talks\.jsonl:.*)$", PAGE, re.MULTILINE)
    for message, conversation in zip(messages, faulty, strict=True):
        Path("talks.jsonl").write_text(
            "".join(json.dumps({"messages": lines}) + "\n" for lines in (good, conversation))
        )
        with pytest.raises(DataError) as raised:
            prepare_tokens(DataConfig(source=("talks.jsonl",), format="chat", cache_folder="cache"), root / "model")
        assert str(raised.value) == message
