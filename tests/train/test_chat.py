"""Training and evaluation on conversations: the loss is that of their answers, on every layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from crossdock.tools.generate import Sampling, generate
from crossdock.tools.opening import find_model, open_model
from tests.chats import QWEN3, TAGGED, turns, write_chat_model, write_conversations
from tests.ranks import RankPool
from tests.tiny import run_trainer

SEQ_LEN = 96
# Each has a row of its own, and two are too long.
TALKS = [
    turns("Which experts?" + "?" * number, "All" + " of them" * (number % 4), "Why?", "B" + "e" * number + "cause")
    for number in range(8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_chat_model(folder / "model", TAGGED)
    write_conversations(folder / "talks.jsonl", TALKS)
    write_conversations(folder / "long.jsonl", [turns("a" * 70, "b" * 20)])
    return folder


def _train(
    ranks: RankPool, folder: Path, name: str, world_size: int, source: str, *overrides: str
) -> list[dict[str, Any]]:
    settings = [
        *("--data.format", "chat", "--data.source", str(folder / source), "--checkpoint.initial-load-in-hf"),
        *("--training.steps", "2", "--training.seq-len", str(SEQ_LEN)),
        *("--parallelism.expert-parallel-degree", str(world_size)),
        *overrides,
    ]
    arguments = (str(folder / "model"), str(folder / name), str(folder / "cache"), settings)
    return ranks.run(world_size, run_trainer, *arguments)[0]["metrics"]


@torch.no_grad()
def _transformers_loss(model_folder: Path, talks: list[list[dict[str, Any]]], last: bool = False) -> tuple[float, int]:
    """The mean loss of transformers' model over what its own mask says, one conversation at a time, and how many."""
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float64, experts_implementation="eager", attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    total, count = 0.0, 0
    for messages in talks:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = (torch.tensor([encoded[name][: SEQ_LEN + 1]]) for name in ("input_ids", "assistant_masks"))
        labels = ids.masked_fill(mask == 0, -100)[0, 1:]
        logits = model(input_ids=ids).logits[0, :-1]
        total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count, count


def test_a_steps_loss_is_that_of_transformers_over_the_answers(ranks: RankPool, folder: Path) -> None:
    for world_size in (1, 2):
        batch = ("--training.local-batch-size", str(8 // world_size), "--training.dtype", "float64")
        metrics = _train(ranks, folder, f"first{world_size}", world_size, "talks.jsonl", *batch)
        assert metrics[0]["loss"] == pytest.approx(_transformers_loss(folder / "model", TALKS)[0], rel=1e-6)


def test_a_rank_without_targets_takes_part_and_counts_nothing(ranks: RankPool, folder: Path) -> None:
    """A row that is all question, on a rank of its own, in training and in validation."""
    settings = (
        *("--data.packing", "stream", "--data.no-attend-within-documents", "--training.dtype", "float64"),
        *("--model.attn-implementation", "eager", "--moe.sequence-aux-loss-coeff", "0.01"),
        *("--validation.interval", "2", "--validation.data", str(folder / "long.jsonl")),
    )
    one, two = (
        _train(
            *(ranks, folder, f"none{size}", size, "long.jsonl"),
            *("--training.local-batch-size", str(2 // size), "--training.seq-len", "48", *settings),
        )
        for size in (1, 2)
    )
    for mine, other in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "sequence_aux_loss", "tokens"):
            assert mine[name] == pytest.approx(other[name], rel=1e-9), name
            assert mine[name] > 0
    assert one[1]["validation_loss"] == pytest.approx(two[1]["validation_loss"], rel=1e-9)


def test_a_resumed_run_has_its_template_and_exports_it(ranks: RankPool, folder: Path) -> None:
    shutil.copytree(folder / "model", folder / "bare")
    (folder / "bare" / "chat_template.jinja").rename(folder / "mine.jinja")
    settings = [
        *("--data.format", "chat", "--data.source", str(folder / "talks.jsonl"), "--training.seq-len", str(SEQ_LEN)),
        *("--data.chat-template", str(folder / "mine.jinja"), "--training.local-batch-size", "8"),
    ]
    arguments = (str(folder / "bare"), str(folder / "resumed"), str(folder / "cache"))
    ranks.run(1, run_trainer, *arguments, [*settings, "--training.steps", "1"])
    (folder / "mine.jinja").unlink()
    (folder / "resumed" / "metrics.jsonl").rename(folder / "before.jsonl")
    (line,) = ranks.run(1, run_trainer, *arguments, [*settings, "--training.steps", "2"])[0]["metrics"]
    assert line["step"] == 2
    assert (folder / "resumed" / "hf" / "chat_template.jinja").read_text() == TAGGED


def test_eval_counts_the_answers_alone(
    folder: Path, only_rank: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data", folder / "talks.jsonl", "--cache-folder", folder / "cache", "--seq-len", SEQ_LEN)
    loss, targets = _transformers_loss(folder / "model", TALKS)
    assert only_rank("eval", folder / "model", *options, "--format", "chat") == 0
    cut, line = capsys.readouterr().out.splitlines()
    assert cut.startswith("2 conversations are longer than a row")
    words = line.split()
    assert float(words[1]) == pytest.approx(loss, abs=1e-4)
    assert int(words[5].replace(",", "")) == targets
    assert only_rank("eval", folder / "model", *options, "--format", "chat", "--train-on", "last") == 0
    _, line = capsys.readouterr().out.splitlines()
    assert int(line.split()[5]) < targets


def _answer(model_folder: str, question: str) -> list[int]:
    source = find_model(Path(model_folder))
    model, chat = open_model(source, torch.device("cpu")), source.chat_tokenizer()
    return generate(model, source.tokenizer(), question, Sampling(max_new_tokens=12), chat=chat)


def test_a_question_is_answered_as_by_transformers_up_to_the_end_of_a_turn(ranks: RankPool, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(turns("Why?"), add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    one, two = ranks.run(2, _answer, str(folder / "model"), "Why?")
    assert one == two == output
    shutil.copytree(folder / "model", folder / "ends")
    settings = json.loads((folder / "ends" / "tokenizer_config.json").read_text())
    settings["eos_token"] = tokenizer.convert_ids_to_tokens(output[2])
    (folder / "ends" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ranks.run(1, _answer, str(folder / "ends"), "Why?") == [output[: output.index(output[2]) + 1]]


def test_generate_prints_the_answer_alone(
    folder: Path, only_rank: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert only_rank("generate", folder / "model", "--chat", "--prompt", "Why then?", "--max-new-tokens", 3) == 0
    assert "Why then?" not in capsys.readouterr().out


def test_qwen3s_history_trains(ranks: RankPool, folder: Path) -> None:
    (folder / "qwen3.jinja").write_text(QWEN3)
    options = ("--data.chat-template", str(folder / "qwen3.jinja"), "--training.local-batch-size", "4")
    metrics = _train(ranks, folder, "qwen3", 2, "talks.jsonl", *options, "--training.seq-len", "96")
    assert all(line["loss"] > 0 for line in metrics)
