"""Benchmarks that need a GPU run through without one, and the page about all of them leaves none out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import activation, expert_kernels, symmetric, table, train_step_gpu
from crossdock.kernels import runtime

ROOT = Path(__file__).parent.parent
interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_page_names_every_benchmark_and_every_result() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    helpers = {"__init__", "results_file", "table"}
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - helpers
    assert len(programs) > 8
    assert [name for name in sorted(programs) if f"benchmarks/{name}.py" not in page] == []
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert [path.name for path in results if path.name not in page and path.name != "tuned.json"] == []


@without_gpu
@pytest.mark.parametrize("benchmark", [activation, expert_kernels, symmetric, train_step_gpu])
def test_without_a_gpu_one_line_says_so(benchmark, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sys.argv", ["benchmark"])
    assert benchmark.main() == 2
    assert "needs a GPU" in capsys.readouterr().err


@without_gpu
def test_gpu_sh_asks_for_a_gpu() -> None:
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("needs a GPU that torch can use: there is none here")


@interpreted
def test_expert_kernels_agree_with_peers_and_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert expert_kernels.main(["--device", "cpu", "--rounds", "1"]) == 0
    assert "grouped_mm" in capsys.readouterr().out


@interpreted
def test_training_steps_have_the_same_losses(capsys: pytest.CaptureFixture[str]) -> None:
    variants = ["crossdock", "crossdock, grouped_mm", "transformers, grouped_mm"]
    assert train_step_gpu.main(["--device", "cpu", "--rounds", "1", "--batch", "1", "--variants", *variants]) == 0
    assert "DO NOT AGREE" not in capsys.readouterr().out


def test_the_table_shows_all_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([]) == 0
    shown = capsys.readouterr().out
    assert "train_step_layouts" in shown
    assert "beside" in shown
    assert table.main(["nothing.json"]) == 2
    assert "nothing.json" in capsys.readouterr().err
