"""`crossdock generate` and `export`: a mistake gives one message before any rank is started, and writes nothing."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import crossdock.train.launch as launch
from crossdock.checkpoint import write_checksums
from crossdock.config import load_config, write_run_settings
from tests.chats import write_chat_model
from tests.checkpoint.hf_folders import snapshot
from tests.test_cli import call, panels
from tests.tiny import by_hand, write_assets, write_hf_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` is a model; `run` has a file that says it is a checkpoint; `new` has none yet; `foreign` is another kind."""
    folder = tmp_path_factory.mktemp("models")
    write_hf_model(folder / "hf", max_position_embeddings=20)
    write_chat_model(folder / "chat", max_position_embeddings=20)
    (folder / "chat.jsonl").touch()
    write_checksums(write_assets(folder / "run" / "hf_assets"))
    step = folder / "run" / "checkpoint" / "step-00000003"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    (folder / "new").mkdir()
    for name in ("run", "new"):
        write_run_settings(load_config(None), folder / name)
    write_assets(folder / "foreign", model_type="llama")
    write_assets(folder / "unreadable")
    (folder / "unreadable" / "config.json").write_text("{")
    write_assets(folder / "empty_config")
    (folder / "empty_config" / "config.json").write_text("{}")
    write_hf_model(folder / "tanh", hidden_act="tanh")
    write_assets(folder / "negative", num_hidden_layers=-1, num_experts="many")
    write_assets(folder / "broken_run" / "hf_assets")
    (folder / "broken_run" / "config.toml").write_text(by_hand("[training\n"))
    (folder / "broken_run" / "checkpoint" / "step-00000003").mkdir(parents=True)
    (folder / "broken_run" / "checkpoint" / "step-00000003" / "state.json").write_text("{}")
    (folder / "taken").mkdir()
    (folder / "file").touch()
    return folder


@pytest.fixture(autouse=True)
def launches(models: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run beside the models, on a machine without GPUs; the launches that would have started ranks."""
    started: list[list[str]] = []
    monkeypatch.setattr(
        launch, "start_ranks", lambda arguments, machines, max_restarts=0: started.append(arguments) or 0
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("COLUMNS", "1000")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(models)
    return started


# What is typed, and words that the message must hold.
MISTAKES = [
    ("generate", "MODEL", "required"),
    ("generate nowhere --prompt a", "nowhere'", "run folder"),
    ("generate file --prompt a", "file'", "run folder"),
    ("generate taken --prompt a", "taken'", "no config.json"),
    ("generate new --prompt a", "new'", "no checkpoint yet"),
    ("generate run/checkpoint/step-00000004 --prompt a", "step-00000004'", "run folder"),
    ("generate foreign --prompt a", "foreign'", "qwen3_moe"),
    ("generate unreadable --prompt a", "unreadable'", "config.json"),
    ("generate empty_config --prompt a", "empty_config'", "model_type None"),
    ("generate tanh --prompt a", "tanh'", "hidden_act"),
    ("generate negative --prompt a", "negative'", "config.json"),
    ("generate broken_run --prompt a", "broken_run", "valid TOML"),
    ("generate hf --prompt ''", "--prompt", "0 tokens; the model takes 1 to 19"),
    ("generate hf --prompt 'twenty is one too many'", "--prompt", "22 tokens; the model takes 1 to 19"),
    ("generate hf --prompt a --prompt ''", "--prompt", "0 tokens"),
    ("generate hf --prompt a --max-new-tokens 0", "--max-new-tokens", "1 or more"),
    ("generate hf --prompt a --max-new-tokens some", "--max-new-tokens", "'some'"),
    ("generate hf --prompt a --temperature=-0.1", "--temperature", "0 or more"),
    ("generate hf --prompt a --temperature nan", "--temperature", "0 or more"),
    ("generate hf --prompt a --temperature inf", "--temperature", "0 or more"),
    ("generate hf --prompt a --top-p 0", "--top-p", "above 0 and at most 1"),
    ("generate hf --prompt a --top-p 1.1", "--top-p", "above 0 and at most 1"),
    ("generate hf --prompt a --top-p nan", "--top-p", "above 0 and at most 1"),
    ("generate hf --prompt a --seed=-1", "--seed", "0 to 2^63 - 1"),
    ("generate hf --prompt a --seed 9223372036854775808", "--seed", "0 to 2^63 - 1"),
    ("generate hf --prompt a --dtype float16", "--dtype", "bfloat16"),
    ("generate hf --prompt a --nproc 9", "--nproc", "use 1 or 2 or 3"),
    ("generate hf --prompt a --temprature 1", "--temprature", "unrecognized"),
    ("generate hf --chat --prompt a", "hf: has no chat template", "chat_template.jinja"),
    ("generate chat --chat --prompt 'twenty is one too many'", "--prompt", "the model takes 1 to 19"),
    ("eval hf --data chat.jsonl --format chat", "hf: has no chat template", "data.chat_template = FILE"),
    ("eval hf --data chat.jsonl --format chat --chat-template nowhere", "nowhere'", "readable file"),
    ("eval chat --data chat.jsonl --train-on last", "--train-on", "needs --format chat"),
    ("eval chat --data chat.jsonl --format chat --train-on first", "--train-on", "assistant"),
    ("export run", "destination", "required"),
    ("export hf there", "hf'", "run folder or a checkpoint"),
    ("export run taken", "taken'", "exists"),
    ("export run file", "file'", "exists"),
    ("export run there --dtype float8", "--dtype", "bfloat16"),
    ("export run there --max-shard-size 5TB", "--max-shard-size", "500MB or 2GiB"),
    ("export new there", "new'", "no checkpoint yet"),
    ("export run there --nproc 9", "--nproc", "use 1 or 2 or 3"),
]


@pytest.mark.parametrize(("arguments", "field", "valid"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_gives_one_message(
    arguments: str, field: str, valid: str, launches: list[Any], models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(models)
    assert call(arguments) == 2
    output, message = capsys.readouterr()
    assert output == ""
    assert panels(message) == 1
    assert "Traceback" not in message
    assert field in message
    assert valid in message
    assert launches == []
    assert snapshot(models) == before


def test_ranks_get_what_was_typed(launches: list[list[str]]) -> None:
    assert call("generate hf --prompt a --prompt b --top-p 0.5 --nproc 2") == 0
    assert call("export run there --dtype float16") == 0
    assert launches == [
        ["generate", "hf", "--prompt", "a", "--prompt", "b", "--top-p", "0.5"],
        ["export", "run", "there", "--dtype", "float16"],
    ]


@pytest.mark.parametrize("text", [b"-- a\nb", b"a\0b", "é".encode()])
def test_ranks_get_the_prompt_from_standard_input(
    launches: list[list[str]], monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert call("generate hf") == 0
    ((command, model, option),) = launches
    assert (command, model) == ("generate", "hf")
    assert option.startswith("--prompt-file=")


def test_a_prompt_that_is_no_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb")))
    assert call("generate hf") == 2
    assert "UTF-8" in capsys.readouterr().err
    assert call("generate hf --prompt a\udcffb") == 2
    assert "UTF-8" in capsys.readouterr().err
