"""Where kernels run: without Triton, and without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from crossdock.kernels import counting_sort, fused_silu_gate_prob, permute, quantize_fp8, runtime

ROOT = Path(__file__).parents[2]

ON_A_CPU = """
import sys
if sys.argv[1] == "without Triton":
    sys.modules["triton"] = None
import torch
from crossdock.kernels import *
from crossdock.kernels import runtime

assert (runtime.tl is None) == (sys.argv[1] == "without Triton")
assert not runtime.INTERPRETED
gate, up, prob = (torch.randn(*shape, requires_grad=True) for shape in ((9, 4), (9, 4), (9, 1)))
for fused, reference in (
    (get_fused_activation_fn(True), silu_gate_prob_reference),
    (fused_quick_geglu_prob, quick_geglu_prob_reference),
):
    out = fused(gate, up, prob)
    assert torch.equal(out, reference(gate, up, prob))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (gate, up, prob)))
order, counts, row_of_route = counting_sort(torch.tensor([[2, 0], [-1, 2]]), 3)
assert (order.tolist(), counts.tolist()) == ([1, 0, 3, -1], [1, 0, 2])
rows = permute(torch.eye(2, requires_grad=True), order, row_of_route)
assert unpermute(rows, order, row_of_route).tolist() == [[2, 0], [0, 1]]
values, scales = quantize_fp8(gate)
assert values.dtype == torch.float8_e4m3fn
"""


def run(code: str, folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    # Triton reads the source of modules, which `-c` would not have.
    (folder / "code.py").write_text(code)
    done = subprocess.run(
        [sys.executable, folder / "code.py", *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_the_references_compute(tmp_path: Path) -> None:
    run(ON_A_CPU, tmp_path, "without Triton")


@pytest.mark.slow
def test_on_a_cpu_without_the_interpreter_the_references_compute(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    run(ON_A_CPU, tmp_path, "with Triton")


def test_tensors_without_memory_take_the_references() -> None:
    with FakeTensorMode():
        gate, slot_ids = torch.ones(4, 6, requires_grad=True), torch.zeros(4, 2, dtype=torch.int64)
        assert not runtime.runs(gate)
        out = fused_silu_gate_prob(gate, prob=torch.ones(4))
        out.sum().backward()
        order, _, row_of_route = counting_sort(slot_ids, 3)
        assert permute(out, order, row_of_route).shape == (8, 3)
        assert quantize_fp8(out)[1].shape == (4, 1)


def test_kernels_are_what_the_tests_of_this_folder_run(device: torch.device) -> None:
    assert runtime.runs(torch.ones(1, device=device), None)
    assert not runtime.runs(torch.ones(1, device=device, dtype=torch.float64))
