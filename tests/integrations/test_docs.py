"""The programs in docs/transformers.md and examples/ run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crossdock.checkpoint import latest_step
from tests.integrations.tiny_models import write_model
from tests.integrations.trainer_runs import launched
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/transformers.md").read_text(), re.MULTILINE | re.DOTALL)


def _execute(block: str, folder: str) -> None:
    before = os.getcwd()
    os.chdir(folder)
    try:
        with launched():
            exec(compile(block, "docs/transformers.md", "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(before)


# By number, for names that do not change with the text.
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_of_the_page_run_on_two_processes(ranks: RankPool, tmp_path: Path, number: int) -> None:
    assert len(BLOCKS) == 4
    write_model(tmp_path / "my-moe", "qwen3_moe")
    ranks.run(2, _execute, BLOCKS[number], str(tmp_path))
    assert (tmp_path / "tuned" / "model.safetensors").exists() == ("tuned" in BLOCKS[number])
    assert latest_step(tmp_path / "out" / "checkpoints") == (4 if "Trainer" in BLOCKS[number] else None)


def _run_example(output: Path, steps: int) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples/finetune_with_trainer.py"), "--output", str(output), "--steps", str(steps)]
    command += ["--seq-len", "32", "--vocab-size", "257"]
    result = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", result.stdout)]


def test_example_learns_and_saves(tmp_path: Path) -> None:
    losses = _run_example(tmp_path, 15)
    assert len(losses) == 3
    # An untrained model is at 5.55: one of 257 tokens.
    assert losses[-1] < losses[0] < 5.7
    assert latest_step(tmp_path / "checkpoints") == 15


@pytest.mark.slow
def test_example_started_again_resumes(tmp_path: Path) -> None:
    _run_example(tmp_path, 10)
    assert len(_run_example(tmp_path, 20)) == 2
    assert latest_step(tmp_path / "checkpoints") == 20
