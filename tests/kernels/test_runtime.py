"""Where kernels run: without Triton, without the interpreter, and compiled for a GPU that is not there."""

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

# Every kernel by way of its module, with the arguments of a bfloat16 call.
COMPILED_FOR_A_GPU = """
import sys
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

blocks = {"BLOCK_ROWS": 8, "BLOCK_COLUMNS": 256}
silu = {"ALPHA": 1.0, "LIMIT": None, "OFFSET": 0.0}
quick_geglu = {"ALPHA": 1.702, "LIMIT": 7.0, "OFFSET": 1.0}
quantize = {"GROUP": 128, "LARGEST": 448.0, "SMALLEST_SCALE": 2.0**-126, "BLOCK_ROWS": 16}
cases = [
    ("activations", "_forward_kernel", quick_geglu | blocks),
    ("activations", "_forward_kernel", silu | blocks | {"prob_ptr": None}),
    ("activations", "_backward_kernel", quick_geglu | blocks),
    ("activations", "_backward_kernel", silu | blocks | {"prob_ptr": None, "prob_grad_ptr": None}),
    ("sort", "_count_kernel", {"BLOCK": 128}),
    ("sort", "_scatter_kernel", {"BLOCK": 128}),
    ("permute", "_gather_kernel", blocks | {"TOP_K": 8}),
    ("permute", "_sum_kernel", blocks | {"TOP_K": 8}),
    ("quantize", "_quantize_kernel", quantize),
]
types = {"prob_ptr": "*fp32", "prob_grad_ptr": "*fp32", "scales_ptr": "*fp32", "slots_ptr": "*i64", "first_ptr": "*i64"}
types |= {"histogram_ptr": "*i64", "order_ptr": "*i64", "row_of_route_ptr": "*i64"}
for module, name, constants in cases:
    kernel = getattr(import_module("crossdock.kernels." + module), name)
    values = "*u8" if module == "quantize" else "*bf16"
    default = lambda name: (values if name == "values_ptr" else "*bf16") if name.endswith("_ptr") else "i32"
    signature = {
        name: "constexpr" if name in constants else types.get(name, default(name)) for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    print(name)
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


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    assert len(run(COMPILED_FOR_A_GPU, tmp_path).split()) == 9


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
