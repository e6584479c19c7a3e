"""What the README shows works as it is written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from crossdock.config import load_config, validate
from tests.blocks import blocks_of, commands_of

ROOT = Path(__file__).parents[1]


def test_own_model_program_runs_on_two_ranks_and_learns(tmp_path: Path) -> None:
    (program,) = (block.text for block in blocks_of("README.md", "python") if not block.reason)
    assert len([line for line in program.splitlines() if line.strip()]) < 20
    script = tmp_path / "own_model.py"
    script.write_text(program)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = sorted(re.findall(r"rank (\d) of 2 holds experts \(([\d, ]+)\), loss ([\d.]+)", result.stdout))
    assert [(rank, experts) for rank, experts, _ in lines] == [("0", "0, 1, 2, 3"), ("1", "4, 5, 6, 7")]
    # An untrained model is at 0.22: the mean of sin(x)^2, over two ranks.
    assert all(float(loss) < 0.1 for _, _, loss in lines)


# They take minutes, or machines that are not here; what they ask for is checked to be valid.
@pytest.mark.parametrize("command", commands_of("README.md", r"(\w+=\S+ )*\./run_train\.sh"))
def test_training_commands_ask_for_valid_settings(command: str) -> None:
    words = shlex.split(command)
    script = words.index("./run_train.sh")
    variables = dict(word.split("=", 1) for word in words[:script])
    ranks = {"configs/qwen3_30b_a3b.toml": 8}
    path = variables.get("CONFIG_FILE", "configs/debug.toml")
    config = load_config(ROOT / path, words[script + 1 :])
    validate(config, int(variables.get("NGPU", ranks.get(path, 2))))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_configs_load_and_those_that_work_are_valid(path: Path) -> None:
    config = load_config(path)
    if config.moe.dispatcher == "deepep":
        with pytest.raises(ValueError, match=r"moe\.dispatcher"):
            validate(config, 8)
    else:
        validate(config, 2 if path.stem == "debug" else 8)
