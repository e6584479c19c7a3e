"""Other families than the default one go through the trainer: weights in, steps on two layouts, weights out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny_families import write_family
from tests.ranks import RankPool
from tests.tiny import run_trainer, write_assets


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_a_family_trains_alike_on_two_layouts_and_transformers_loads_the_result(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    assets = write_assets(tmp_path / "assets")
    folder = write_family(tmp_path / "model", name, vocab_size=260)
    shutil.copy(assets / "tokenizer.json", folder)
    overrides = ["--model.name", name, "--checkpoint.initial-load-in-hf", "--training.steps", "3"]
    overrides += ["--training.global-batch-size", "8", "--training.local-batch-size", "4"]
    losses = {}
    for ep in (1, 2):
        settings = [*overrides, "--parallelism.expert-parallel-degree", str(ep)]
        arguments = str(folder), str(tmp_path / f"run{ep}"), str(tmp_path / "cache"), settings
        losses[ep] = [line["loss"] for line in ranks.run(2, run_trainer, *arguments)[0]["metrics"]]
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-5)
    assert losses[1][-1] < losses[1][0]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(tmp_path / f"run{ep}" / "hf", dtype=torch.float32)
            .eval()(torch.arange(3, 20)[None])
            .logits
            for ep in (1, 2)
        ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
