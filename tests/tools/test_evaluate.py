"""The loss on text that is not trained on: `crossdock eval`, and validation during training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from crossdock.tools.report import read_load
from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets

SEQ_LEN = 32
TALK = "\n".join(f"Line {number}: the experts of this house took {number * 7} tokens in." for number in range(20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_assets(folder / "assets")
    (folder / "talk.txt").write_text(TALK)
    lines = [{"text": f"Document {number} says {'more ' * (number % 7)}than it has to."} for number in range(400)]
    (folder / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _train(ranks: RankPool, folder: Path, name: str, world_size: int, *overrides: str) -> list[dict[str, Any]]:
    settings = [
        *("--training.steps", "4", "--training.local-batch-size", str(8 // world_size)),
        *("--data.source", str(folder / "talks.jsonl"), "--parallelism.expert-parallel-degree", str(world_size)),
        *overrides,
    ]
    arguments = (str(folder / "assets"), str(folder / name), str(folder / "cache"), settings)
    return ranks.run(world_size, run_trainer, *arguments)[0]["metrics"]


def _transformers_loss(model_folder: Path, text: str) -> tuple[float, int]:
    """Mean cross entropy over every token but the first, in windows of SEQ_LEN inputs, and their number."""
    ids = torch.tensor([*Tokenizer.from_file(str(model_folder / "tokenizer.json")).encode(text).ids, 0])
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, SEQ_LEN):
            window = ids[start : start + SEQ_LEN + 1]
            total += F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
    return total / (len(ids) - 1), len(ids) - 1


def test_eval_gives_transformers_loss(
    ranks: RankPool, folder: Path, only_rank: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    _train(ranks, folder, "run", 2)
    loss, targets = _transformers_loss(folder / "run" / "hf", TALK)
    cache = ("--cache-folder", str(folder / "cache"), "--data", str(folder / "talk.txt"))
    for model in (folder / "run", folder / "run" / "hf", folder / "run" / "checkpoint" / "step-00000004"):
        assert only_rank("eval", model, *cache, "--seq-len", SEQ_LEN, "--batch-size", 3) == 0
        words = capsys.readouterr().out.split()
        assert [*words[:6:2], *words[6:8]] == ["loss", "perplexity", "tokens", "max/mean", "load"]
        assert 1 <= float(words[8]) <= 16
        assert float(words[1]) == pytest.approx(loss, abs=1e-4)
        assert float(words[3]) == pytest.approx(np.exp(loss), rel=1e-3)
        assert int(words[5].replace(",", "")) == targets


def test_validation_is_the_same_on_every_layout_and_changes_no_training(ranks: RankPool, folder: Path) -> None:
    held_out = ("--data.held-out", "0.1", "--moe.expert-bias")
    validated = (*held_out, "--validation.interval", "3")
    one, two = (_train(ranks, folder, f"validated{world_size}", world_size, *validated) for world_size in (1, 2))
    plain = _train(ranks, folder, "plain", 2, *held_out)
    assert [line["step"] for line in two if "validation_loss" in line] == [3, 4], "at the interval and at the end"
    for mine, other in zip(one[2:], two[2:], strict=True):
        assert mine["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-5)
    assert [line["loss"] for line in two] == [line["loss"] for line in plain], "validation touched the training"
    assert [line["max_mean_load"] for line in two] == [line["max_mean_load"] for line in plain]


def test_validation_on_a_file_gives_transformers_loss(ranks: RankPool, folder: Path) -> None:
    file = ("--validation.data", str(folder / "talk.txt"), "--validation.max-samples", "0")
    metrics = _train(ranks, folder, "file", 2, "--validation.interval", "100", *file)
    loss, _ = _transformers_loss(folder / "file" / "hf", TALK)
    assert metrics[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert all("validation_loss" not in line for line in metrics[:-1])


@pytest.mark.parametrize("within", [False, True])
def test_padded_rows_train_alike_on_every_layout_and_count_no_padding(
    ranks: RankPool, folder: Path, within: bool
) -> None:
    settings = (
        *("--data.packing", "documents", "--training.dtype", "float64"),
        *("--model.attn-implementation", "eager", "--moe.sequence-aux-loss-coeff", "0.01"),
        *("--metrics.load-interval", "1"),
        *(("--data.attend-within-documents",) if within else ()),
    )
    one, two = (_train(ranks, folder, f"padded{within}{size}", size, *settings) for size in (1, 2))
    for mine, other in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "sequence_aux_loss", "tokens", "max_mean_load"):
            assert mine[name] == pytest.approx(other[name], rel=1e-9), name
        assert mine["tokens"] < 8 * SEQ_LEN, "no row was padded"
    _, counts, _ = read_load(folder / f"padded{within}2" / "expert_load.bin")
    routes = [2 * line["tokens"] for line in two]  # top-2
    assert counts.sum(axis=2).tolist() == [[expected, expected] for expected in routes]
