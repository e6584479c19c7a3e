"""The programs in examples/ run as they are written, and say what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crossdock.tools.report import LOAD_FILE, LoadLog

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SECONDS = 240


def run(name: str, *arguments: str, ranks: int = 0, code: int = 0) -> str:
    """What it prints; what it complains of where it shall end with another `code` than 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), *arguments],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_fits_on_a_page(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80


def test_own_transformer_learns_the_same_on_two_processes_as_on_one() -> None:
    one, two = (losses(run("own_transformer.py", "--steps", "30", ranks=ranks)) for ranks in (1, 2))
    assert len(one) == 3
    assert one[-1] < one[0]
    assert two == pytest.approx(one, abs=2e-3)


def test_swapping_the_dispatcher_sends_fewer_rows_and_changes_nothing() -> None:
    output = run("swap_dispatcher.py", ranks=2)
    plain, ours = (int(rows) for rows in re.findall(r": (\d+) rows", output))
    assert ours < plain
    assert output.endswith("outputs and gradients are the same\n")


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_dispatcher_of_one_s_own_gives_what_alltoall_gives(ranks: int) -> None:
    assert run("own_dispatcher.py", ranks=ranks).count("as alltoall, bit by bit") == ranks


def test_a_tabular_model_learns() -> None:
    output = run("tabular.py", "--steps", "150", ranks=2)
    assert float(re.findall(r"digits: ([\d.]+)%", output)[0]) > 90
    assert output.count("expert ") == 8


def test_a_trace_shows_what_balancing_would_gain(tmp_path: Path) -> None:
    def average(name: str, output: str) -> float:
        return float(re.findall(rf"^{name} +busiest rank / mean: ([\d.]+)", output, re.MULTILINE)[0])

    for wrong in (("--ranks", "0"), ("--every", "0"), (str(tmp_path / "nowhere"),)):
        errors = run("eplb_on_a_trace.py", *wrong, code=2)
        assert "Traceback" not in errors
    made_up = run("eplb_on_a_trace.py")
    assert average("exchange", made_up) < average("no plan", made_up)
    log = LoadLog(tmp_path / LOAD_FILE, 2, 8, 0)
    for step in range(1, 13):
        log.write(step, torch.tensor([[80, 10, 10, 10, 10, 10, 10, 10]] * 2))
    log.close()
    recorded = run("eplb_on_a_trace.py", str(tmp_path), "--ranks", "2", "--redundant", "2", "--every", "3")
    assert "12 steps, 2 layers, 8 experts on 2 ranks" in recorded
    assert average("deepseek", recorded) < average("no plan", recorded)
