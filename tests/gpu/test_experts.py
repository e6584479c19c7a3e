"""Experts by Triton kernels on a GPU: every case and formula of the CPU's tests, and sizes that people train with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from crossdock.experts import GPT_OSS, SWIGLU, ExpertParams, ExpertsFormula, eager, triton
from crossdock.kernels import KERNELS, ROW_BUCKETS, TileTable, candidates
from tests.experts.test_backends import CASES, FORMULAS, _assert_close, _evaluate, _inputs, _oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def on_gpu(backend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The backend for tensors of a CPU, which autograd follows there and back."""

    def run(tokens: Tensor, ids: Tensor, weights: Tensor, params: ExpertParams, formula: ExpertsFormula) -> Tensor:
        given = ExpertParams(*(None if param is None else param.cuda() for param in params))  # type: ignore[arg-type]
        return backend(tokens.cuda(), ids.cuda(), weights.cuda(), given, formula).cpu()

    return run


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_case_equals_the_oracle(case: str, dtype: torch.dtype, static: bool) -> None:
    inputs = _inputs(case, dtype)
    _assert_close(_evaluate(on_gpu(partial(triton, static=static)), *inputs), _oracle(*inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula_equals_the_oracle(name: str, bias: bool) -> None:
    inputs = _inputs("missing routes", torch.float32, formula=FORMULAS[name], bias=bias)
    _assert_close(_evaluate(on_gpu(triton), *inputs), _oracle(*inputs), TOLERANCE[torch.float32])


def _errors(rows_per_slot: int, tiles: TileTable | None = None, formula: ExpertsFormula = SWIGLU) -> dict[str, float]:
    """Of outputs and gradients in bfloat16, relative to a loop in float32 over the same numbers; `H 1024, I 384`."""
    num_slots, hidden, inner, top_k = 8, 1024, 384, 2
    num_tokens = rows_per_slot * num_slots // top_k

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device="cuda") * scale).bfloat16()

    # Uneven: slot 0 has next to nothing.
    ids = torch.rand(num_tokens, num_slots, device="cuda").mul_(torch.linspace(0.2, 1, num_slots, device="cuda"))
    ids = ids.topk(top_k, dim=1).indices
    params = [
        draw(num_slots, hidden, 2 * inner, scale=hidden**-0.5),
        draw(num_slots, inner, hidden, scale=inner**-0.5),
    ]
    if formula is GPT_OSS:
        params += [draw(num_slots, 2 * inner), draw(num_slots, hidden)]
    given = [draw(num_tokens, hidden), torch.rand(num_tokens, top_k, device="cuda"), *params]
    grad = draw(num_tokens, hidden)
    results = []
    for backend, dtype in ((partial(triton, static=True, tiles=tiles), torch.bfloat16), (eager, torch.float32)):
        leaves = [(each if each.dtype == torch.float32 else each.to(dtype)).clone().requires_grad_() for each in given]
        y = backend(leaves[0], ids, leaves[1], ExpertParams(*leaves[2:]), formula)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))])
    names = ["y", "tokens", "weights", *ExpertParams._fields]
    pairs = zip(names, *results, strict=False)
    return {name: ((got.float() - wanted).norm() / wanted.norm()).item() for name, got, wanted in pairs}


@pytest.mark.parametrize("formula", [SWIGLU, GPT_OSS], ids=["silu", "gpt-oss"])
@pytest.mark.parametrize("rows_per_slot", ROW_BUCKETS)
def test_usual_sizes_stay_near_a_loop(rows_per_slot: int, formula: ExpertsFormula) -> None:
    for name, error in _errors(rows_per_slot, formula=formula).items():
        assert error <= 1e-2, (name, error)  # NaN is no number that is less


@pytest.mark.parametrize("rows_per_slot", [16, 64, 1024])
def test_every_candidate_computes_the_same(rows_per_slot: int) -> None:
    choices = {kernel: candidates(kernel, rows_per_slot) for kernel in KERNELS}
    for index in range(max(map(len, choices.values()))):
        tiles = {(kernel, rows_per_slot): each[min(index, len(each) - 1)] for kernel, each in choices.items()}
        for name, error in _errors(rows_per_slot, TileTable(tiles)).items():
            assert error <= 1e-2, (name, error, tiles)


def test_the_same_numbers_in_every_run() -> None:
    torch.manual_seed(0)
    first = _errors(256)
    torch.manual_seed(0)
    assert _errors(256) == first
