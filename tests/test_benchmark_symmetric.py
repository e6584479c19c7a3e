"""`benchmarks/symmetric.py` without a GPU: its bytes, its checks, and that all of it but the clock runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.symmetric import World, bytes_moved, main
from crossdock.comm import VirtualRanks
from crossdock.kernels import runtime
from crossdock.kernels.symmetric import RowLayout

interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")
TINY = ["--device", "cpu", "--ranks", "3", "--tokens", "9", "--experts", "12", "--top-k", "3", "--hidden", "136"]
TINY += ["--rounds", "1"]


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_bytes_are_those_of_the_tensors_that_are_read_and_written(wire: torch.dtype) -> None:
    layout = RowLayout(8, 5, 256, 4, wire)
    num_tokens, pairs = 40, 130

    def size(rows: int, width: int, dtype: torch.dtype) -> int:
        return torch.empty(rows, width, dtype=dtype).nbytes

    tokens, rows = size(num_tokens, 256, torch.bfloat16), size(pairs, 256, torch.bfloat16)
    on_wire = size(pairs, 256, wire) + (size(pairs, 2, torch.float32) if layout.is_fp8 else 0)
    of_tokens = size(num_tokens, 4, torch.int64) + size(num_tokens, 4, torch.float32)
    of_rows = size(pairs, 4, torch.int64) + size(pairs, 4, torch.float32)
    travelling = size(pairs, 4, torch.int32) + size(pairs, 4, torch.float32)
    moved = bytes_moved(layout, 2, num_tokens, pairs)
    assert moved["dispatch"].moved == tokens + 2 * on_wire + rows + of_tokens + 2 * travelling + of_rows
    assert moved["combine"].moved == rows + 2 * on_wire + tokens
    assert moved["dispatch"].least == moved["combine"].least == tokens + rows
    both = moved["dispatch and combine"]
    assert both.moved == moved["dispatch"].moved + moved["combine"].moved
    assert both.least == 2 * (tokens + rows)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, from the interpreter
def test_it_runs_on_a_cpu_without_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TINY) == 0
    output = capsys.readouterr().out
    assert output.count("results agree") == 2 * 3
    assert " us" not in output


@interpreted
def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RowLayout(3, 9, 64, 3, torch.bfloat16)

    def world() -> World:
        memory = VirtualRanks(3)
        return World([memory.of(rank) for rank in range(3)], layout, 4, torch.device("cpu"))

    assert world().agrees()
    combine = World.combine

    def swapped(self: World, *arguments: list) -> list[Tensor]:
        first, *others = combine(self, *arguments)
        return [first.flip(0), *others]

    monkeypatch.setattr(World, "combine", swapped)
    assert not world().agrees()
    assert main(TINY) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == "benchmarks.symmetric needs a GPU: there is none here\n"
    assert main([*TINY, "--write"]) == 2
