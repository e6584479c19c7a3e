"""What docs/layouts.md shows works as it is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from crossdock.config import load_config, validate
from tests.integrations.tiny_models import write_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "layouts.md").read_text()
SETTINGS, PROGRAMS = (
    re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for language in ("toml", "python")
)


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_settings_are_valid_on_four_ranks(tmp_path: Path, number: int) -> None:
    (tmp_path / "layout.toml").write_text(SETTINGS[number])
    validate(load_config(tmp_path / "layout.toml"), 4)


def test_the_program_starts_from_transformers_loss_and_learns(tmp_path: Path) -> None:
    (program,) = PROGRAMS
    write_model(tmp_path / "my-moe", "qwen3_moe")
    (tmp_path / "program.py").write_text(program)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    tokens = torch.randint(0, 90, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "my-moe")(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    losses = {rank: re.findall(rf"rank {rank} of 2, step \d: loss ([\d.]+)", result.stdout) for rank in (0, 1)}
    assert losses[0] == losses[1]
    assert float(losses[0][0]) == pytest.approx(expected, abs=2e-4)
    assert float(losses[0][-1]) < float(losses[0][0])
