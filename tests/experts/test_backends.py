"""Every experts backend computes the same function: the float64 oracle's."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from crossdock.experts import (
    EXPERTS_BACKENDS,
    EXPERTS_OPS,
    GPT_OSS,
    SWIGLU,
    ExpertParams,
    ExpertsBackend,
    ExpertsFormula,
    GroupedExperts,
    choose_backend,
    cpu,
    eager,
    grouped_mm,
    triton,
)
from crossdock.experts.formula import ACTIVATIONS
from crossdock.kernels import runtime
from tests.experts.oracle import experts_forward, experts_gradients
from tests.memory import kept_bytes

# name: (U, K, slots, H, I, which routes)
CASES = {
    "plain": (33, 2, 5, 16, 24, "any"),
    "one route each": (17, 1, 4, 8, 16, "any"),
    "all slots for each": (9, 6, 6, 16, 8, "any"),
    "a single slot": (11, 1, 1, 16, 8, "any"),
    "most slots idle": (20, 2, 12, 8, 8, "first three"),
    "the outer slots idle": (20, 2, 6, 8, 8, "inner"),
    "one slot has everything": (25, 1, 7, 16, 16, "last"),
    "skewed": (64, 3, 8, 24, 8, "skewed"),
    "missing routes": (40, 4, 6, 16, 8, "some"),
    "no routes": (8, 3, 4, 8, 8, "none"),
    "no tokens": (0, 3, 4, 16, 8, "any"),
    "one token": (1, 2, 3, 8, 8, "any"),
    "many slots": (30, 8, 64, 8, 8, "any"),
}
_deterministic: Any = torch.utils.deterministic  # its setting is a property that type checkers do not know
BACKENDS = [
    *sorted(EXPERTS_BACKENDS.items()),
    ("grouped_mm, static", partial(grouped_mm, static=True)),
    ("triton, static", partial(triton, static=True)),
]
# Where there is a GPU, kernels are compiled for it and take no CPU tensors: `tests/gpu/test_experts.py`.
BACKENDS = [(name, each) for name, each in BACKENDS if runtime.INTERPRETED or not name.startswith("triton")]


def _routes(num_tokens: int, top_k: int, num_slots: int, pattern: str) -> Tensor:
    """Distinct slots for each token, `[U, K]`, `-1` where the pattern has no route."""
    scores = torch.rand(num_tokens, num_slots)
    match pattern:
        case "first three":
            scores[:, 3:] -= 2
        case "inner":
            scores[:, [0, -1]] -= 2
        case "last":
            scores[:, -1] += 2
        case "skewed":
            scores += 2 * (torch.arange(num_slots) < 4)
    slot_ids = scores.topk(top_k, dim=1).indices
    if pattern == "some":
        slot_ids[torch.rand(num_tokens, top_k) < 0.6] = -1
        slot_ids[::5] = -1
    return slot_ids.fill_(-1) if pattern == "none" else slot_ids


class Inputs(NamedTuple):
    """Of a backend, and its output's gradient."""

    tokens: Tensor
    slot_ids: Tensor
    weights: Tensor
    params: ExpertParams
    grad_y: Tensor
    formula: ExpertsFormula


def _inputs(
    case: str, dtype: torch.dtype, seed: int = 0, *, formula: ExpertsFormula = SWIGLU, bias: bool = False
) -> Inputs:
    """Weights without a route are not 0."""
    num_tokens, top_k, num_slots, hidden_size, intermediate_size, pattern = CASES[case]
    torch.manual_seed(seed)
    tokens = torch.randn(num_tokens, hidden_size, dtype=torch.float64).to(dtype)
    slot_ids = _routes(num_tokens, top_k, num_slots, pattern)
    weights = torch.rand(num_tokens, top_k, dtype=torch.promote_types(dtype, torch.float32)) + 0.1
    width = formula.width(intermediate_size)
    shapes = (num_slots, hidden_size, width), (num_slots, intermediate_size, hidden_size)
    tensors = [
        (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
        for shape, scale in zip(shapes, (hidden_size**-0.5, 0.5), strict=True)
    ]
    if bias:
        tensors += [torch.randn(num_slots, size, dtype=torch.float64).to(dtype) for size in (width, hidden_size)]
    grad_y = torch.randn(num_tokens, hidden_size, dtype=torch.float64).to(dtype)
    return Inputs(tokens, slot_ids, weights, ExpertParams(*tensors), grad_y, formula)


def _evaluate(
    backend: ExpertsBackend,
    tokens: Tensor,
    slot_ids: Tensor,
    weights: Tensor,
    params: ExpertParams,
    grad_y: Tensor,
    formula: ExpertsFormula = SWIGLU,
) -> dict[str, Tensor]:
    """The output and all gradients by name."""
    given = {"tokens": tokens, "weights": weights} | params._asdict()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items() if tensor is not None}
    own_params = ExpertParams(*(leaves.get(name) for name in ExpertParams._fields))  # type: ignore[arg-type]
    y = backend(leaves["tokens"], slot_ids, leaves["weights"], own_params, formula)
    assert y.dtype == tokens.dtype
    assert y.shape == tokens.shape
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y)  # raises where an input is not in the graph
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def _oracle(
    tokens: Tensor,
    slot_ids: Tensor,
    weights: Tensor,
    params: ExpertParams,
    grad_y: Tensor,
    formula: ExpertsFormula = SWIGLU,
) -> dict[str, np.ndarray]:
    floats = [None if tensor is None else tensor.double().numpy() for tensor in (tokens, weights, *params, grad_y)]
    arrays: Any = [floats[0], slot_ids.numpy(), *floats[1:-1], formula]
    grads = experts_gradients(floats[-1], *arrays)._asdict()  # type: ignore[arg-type]
    return {"y": experts_forward(*arrays)} | {name: grad for name, grad in grads.items() if grad is not None}


def _assert_close(ours: dict[str, Tensor], theirs: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name].double().numpy() - expected)
        assert error <= tolerance * np.linalg.norm(expected), f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [eager, cpu])
def test_equals_the_oracle_in_float64(backend: ExpertsBackend, case: str) -> None:
    inputs = _inputs(case, torch.float64)
    _assert_close(_evaluate(backend, *inputs), _oracle(*inputs), 1e-12)


FORMULAS = {
    **{f"{name}, gated": ExpertsFormula(name) for name in ACTIVATIONS},
    **{f"{name}, ungated": ExpertsFormula(name, gated=False) for name in ACTIVATIONS},
    "gpt-oss": GPT_OSS,
    "clamped": ExpertsFormula("quick_gelu", limit=0.5, up_offset=1.0),
    "clamped, ungated": ExpertsFormula("relu", gated=False, limit=0.5),
    "weight on the input": ExpertsFormula(weight_on="input"),
}


FORMULA_CASES = ("missing routes", "most slots idle", "no tokens")


def _is_quick(backend_name: str) -> bool:
    """Not Triton's, where its kernels are interpreted: a hundred times the time."""
    return not (runtime.INTERPRETED and backend_name.startswith("triton"))


# All cases for each backend, or a choice of them for those that are not quick.
whole_or_choice = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])


@whole_or_choice
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula_equals_the_oracle(name: str, bias: bool, whole: bool) -> None:
    for case in FORMULA_CASES:
        inputs = _inputs(case, torch.float64, formula=FORMULAS[name], bias=bias)
        for backend in (eager, cpu):
            _assert_close(_evaluate(backend, *inputs), _oracle(*inputs), 1e-12)
        for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 4e-2)):
            inputs = _inputs(case, dtype, formula=FORMULAS[name], bias=bias)
            expected = _oracle(*inputs)
            for backend_name, backend in BACKENDS:
                chosen = case == FORMULA_CASES[0] and (dtype == torch.bfloat16) == bias
                if whole or chosen or _is_quick(backend_name):
                    _assert_close(_evaluate(backend, *inputs), expected, tolerance)


@pytest.mark.parametrize(
    "arguments",
    [{"activation": "tanh"}, {"weight_on": "router"}, {"gated": False, "up_offset": 1.0}],
)
def test_an_impossible_formula_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(arguments.values()))) if len(arguments) == 1 else "up_offset"):
        ExpertsFormula(**arguments)


@pytest.mark.parametrize("case", CASES)
def test_backends_equal_the_oracle_in_fp32(case: str) -> None:
    inputs = _inputs(case, torch.float32)
    expected = _oracle(*inputs)
    for _, backend in BACKENDS:
        _assert_close(_evaluate(backend, *inputs), expected, 2e-6)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_cpu_products_in_fp32_or_in_the_tokens_dtype(case: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor can: both ways of computing half precision are near the oracle."""
    module = importlib.import_module("crossdock.experts.cpu")
    monkeypatch.setattr(module, "product_dtype", lambda dtype: dtype if native else torch.float32)
    monkeypatch.setattr(module, "_BLOCK_VALUES", 64)
    inputs = _inputs(case, torch.bfloat16, bias=True)
    _assert_close(_evaluate(cpu, *inputs), _oracle(*inputs), 2e-2)


@pytest.mark.parametrize("case", CASES)
def test_grouped_mm_equals_eager(case: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        inputs = _inputs(case, dtype)
        ours, theirs = _evaluate(grouped_mm, *inputs), _evaluate(eager, *inputs)
        _assert_close(ours, {name: value.double().numpy() for name, value in theirs.items()}, tolerance)
        assert all(ours[name].dtype == value.dtype for name, value in theirs.items())


@pytest.mark.parametrize("case", CASES)
def test_backends_stay_near_the_oracle_in_bf16(case: str) -> None:
    inputs = _inputs(case, torch.bfloat16)
    expected = _oracle(*inputs)
    for _, backend in BACKENDS:
        _assert_close(_evaluate(backend, *inputs), expected, 2e-2)


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_idle_slots_and_missing_routes_get_exact_zeros(name: str, backend: ExpertsBackend, dtype: torch.dtype) -> None:
    for case in ("most slots idle", "missing routes", "no routes", "no tokens"):
        tokens, slot_ids, weights, params, grad_y, _ = _inputs(case, dtype)
        results = _evaluate(backend, tokens, slot_ids, weights, params, grad_y)
        without = (slot_ids < 0).all(dim=1)
        assert (results["y"][without] == 0).all()
        assert (results["tokens"][without] == 0).all()
        assert (results["weights"][slot_ids < 0] == 0).all()
        idle = torch.ones(CASES[case][2], dtype=torch.bool)
        idle[slot_ids[slot_ids >= 0]] = False
        assert idle.any() or case == "missing routes", name
        for parameter in ("gate_and_up_projs", "down_projs"):
            assert (results[parameter][idle] == 0).all()
            assert results[parameter][~idle].flatten(1).any(dim=1).all()


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_what_has_no_route_is_not_read(name: str, backend: ExpertsBackend) -> None:
    """NaN in rows and weights without a route, and in slots without a token, stays there."""
    tokens, slot_ids, weights, params, grad_y, _ = _inputs("missing routes", torch.float32)
    slot_ids[slot_ids == 3] = -1
    expected = _evaluate(backend, tokens, slot_ids, weights, params, grad_y)
    without = (slot_ids < 0).all(dim=1)
    assert without.any()
    tokens[without] = torch.nan
    grad_y[without] = torch.nan
    weights[slot_ids < 0] = torch.nan
    for param in params[:2]:
        param[3] = torch.nan  # type: ignore[index]
    for key, value in _evaluate(backend, tokens, slot_ids, weights, params, grad_y).items():
        assert torch.equal(value, expected[key]), f"{name}: {key}"


@pytest.fixture
def poison() -> Iterator[None]:
    """Every tensor that torch allocates without a value is NaN (or the largest integer)."""
    enabled, fill = torch.are_deterministic_algorithms_enabled(), _deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(enabled)
    _deterministic.fill_uninitialized_memory = fill


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("name", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@whole_or_choice
def test_nothing_depends_on_uninitialised_memory(
    name: str, backend: ExpertsBackend, dtype: torch.dtype, whole: bool
) -> None:
    for case in CASES if whole or _is_quick(name) else FORMULA_CASES:
        poisoned = _evaluate(backend, *_inputs(case, dtype))
        _deterministic.fill_uninitialized_memory = False
        plain = _evaluate(backend, *_inputs(case, dtype))
        _deterministic.fill_uninitialized_memory = True
        for key, value in poisoned.items():
            assert value.isfinite().all(), f"{name}, {case}: {key}"
            assert torch.equal(value, plain[key]), f"{name}, {case}: {key}"


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_change_nothing(name: str, backend: ExpertsBackend, dtype: torch.dtype) -> None:
    tokens, slot_ids, weights, params, grad_y, _ = _inputs("plain", dtype)
    expected = _evaluate(backend, tokens, slot_ids, weights, params, grad_y)

    def padded(tensor: Tensor) -> Tensor:
        """The same values a column off, so that rows start at odd addresses."""
        wide = tensor.new_empty(len(tensor), tensor.shape[1] + 3)
        wide[:, 1:-2] = tensor
        return wide[:, 1:-2]

    for view in (lambda tensor: tensor.t().contiguous().t(), padded):
        strided = view(tokens), view(slot_ids), view(weights)
        assert not any(tensor.is_contiguous() for tensor in strided)
        results = _evaluate(backend, *strided, params, view(grad_y))
        for key, value in results.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")

    summed = _evaluate(backend, tokens, slot_ids, weights, params, torch.ones_like(grad_y))
    expanded = _evaluate(backend, tokens, slot_ids, weights, params, torch.ones((), dtype=dtype).expand(grad_y.shape))
    for key, value in expanded.items():
        assert torch.equal(value, summed[key]), f"{name}: {key}"


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_parameters_may_lie_anywhere_in_memory(name: str, backend: ExpertsBackend) -> None:
    """In a flat buffer, at an odd address; biases with columns together."""
    given = _inputs("plain", torch.float32, formula=GPT_OSS, bias=True)
    expected = _evaluate(backend, *given)

    def in_flat_buffer(tensor: Tensor) -> Tensor:
        flat = tensor.new_empty(tensor.numel() + 1)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)

    matrices, biases = given.params[:2], given.params[2:]
    placed = [in_flat_buffer(tensor) for tensor in matrices]
    columns = [tensor.t().contiguous().t() for tensor in biases if tensor is not None]
    assert not any(tensor.is_contiguous() for tensor in columns)
    results = _evaluate(backend, *given._replace(params=ExpertParams(*placed, *columns)))
    for key, value in results.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_a_bad_weight_of_no_route_has_no_gradient(name: str, backend: ExpertsBackend) -> None:
    given = _inputs("no routes", torch.float32)
    results = _evaluate(backend, *given._replace(weights=torch.full_like(given.weights, torch.nan)))
    for key, value in results.items():
        assert not value.any(), f"{name}: {key}"


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_sums_over_a_tokens_slots_in_fp32_and_rounds_once(name: str, backend: ExpertsBackend) -> None:
    """256 and 63 times 1, all exact in bf16: a bf16 accumulator stays at 256, the exact 319 rounds to 320."""
    num_slots = 64
    tokens = torch.zeros(3, 8, dtype=torch.bfloat16)
    tokens[:, 0] = 1
    gate_and_up_projs = torch.zeros(num_slots, 8, 16, dtype=torch.bfloat16)
    gate_and_up_projs[:, 0, 0], gate_and_up_projs[:, 0, 8] = 32, 1 / 32  # silu(32) is 32
    down_projs = torch.zeros(num_slots, 8, 8, dtype=torch.bfloat16)
    down_projs[:, 0] = 1
    weights = torch.ones(3, num_slots)
    weights[:, 0] = 256
    y = backend(tokens, torch.arange(num_slots).repeat(3, 1), weights, ExpertParams(gate_and_up_projs, down_projs))
    assert (y == 320).all(), name


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_outputs_of_two_calls_with_disjoint_slots_add(name: str, backend: ExpertsBackend) -> None:
    tokens, slot_ids, weights, params, _, _ = _inputs("skewed", torch.float32)
    whole = backend(tokens, slot_ids, weights, params)
    first = backend(
        tokens, slot_ids.masked_fill(slot_ids >= 3, -1), weights, ExpertParams(*(param[:3] for param in params[:2]))
    )
    second_ids = torch.where(slot_ids < 3, -1, slot_ids - 3)
    second = backend(tokens, second_ids, weights, ExpertParams(*(param[3:] for param in params[:2])))
    torch.testing.assert_close(first + second, whole, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_is_deterministic(name: str, backend: ExpertsBackend) -> None:
    inputs = _inputs("skewed", torch.bfloat16)
    first, second = (_evaluate(backend, *inputs) for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items()), name


@pytest.mark.parametrize("backend", [eager, cpu])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradcheck(name: str, backend: ExpertsBackend) -> None:
    torch.manual_seed(0)
    formula, slot_ids = FORMULAS[name], torch.tensor([[0, 2], [2, -1], [-1, -1]])
    width = formula.width(3)
    shapes = (3, 4), (3, 2), (3, 4, width), (3, 3, 4), (3, width), (3, 4)
    leaves = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def call(tokens: Tensor, weights: Tensor, *params: Tensor) -> Tensor:
        return backend(tokens, slot_ids, weights, ExpertParams(*params), formula)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", EXPERTS_BACKENDS)
def test_module_keeps_all_parameters_in_the_graph_when_idle(name: str, bias: bool) -> None:
    experts = GroupedExperts(4, 8, 16, name, bias=bias)
    for tokens, slot_ids in ((torch.randn(0, 8), torch.zeros(0, 2)), (torch.randn(5, 8), -torch.ones(5, 2))):
        experts.zero_grad()
        weights = torch.rand(len(tokens), 2, requires_grad=True)
        y = experts(tokens, slot_ids.long(), weights)
        assert y.requires_grad
        y.sum().backward()
        assert weights.grad is not None
        for parameter_name, parameter in experts.named_parameters():
            assert parameter.grad is not None, f"{name}: {parameter_name}"
            assert (parameter.grad == 0).all(), f"{name}: {parameter_name}"


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "dtype", "reason"),
    [
        (8, 8, torch.float64, "float64"),
        (6, 8, torch.float32, "hidden_size = 6"),
        (8, 6, torch.float32, "intermediate_size = 6"),
        (12, 8, torch.bfloat16, "hidden_size = 12"),
        (8, 12, torch.bfloat16, "intermediate_size = 12"),
    ],
)
def test_grouped_mm_names_what_it_cannot_do_and_the_module_takes_eager(
    hidden_size: int, intermediate_size: int, dtype: torch.dtype, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    experts = GroupedExperts(2, hidden_size, intermediate_size, "grouped_mm").to(dtype)
    tokens, slot_ids, weights = torch.randn(3, hidden_size, dtype=dtype), torch.zeros(3, 1).long(), torch.ones(3, 1)
    params = ExpertParams(experts.gate_and_up_projs, experts.down_projs)
    with pytest.raises(ValueError, match=f"grouped_mm.*{reason}.*eager"):
        grouped_mm(tokens, slot_ids, weights, params)
    importlib.import_module("crossdock.experts.choice")._say_once.cache_clear()
    for _ in range(2):
        assert torch.equal(experts(tokens, slot_ids, weights), eager(tokens, slot_ids, weights, params))
    (said,) = caplog.messages
    assert reason in said
    assert "eager" in said


@pytest.mark.parametrize("backend", [backend for name, backend in BACKENDS if "static" not in name])
def test_every_backend_names_an_id_that_is_no_slot_and_parameters_of_another_dtype(backend: ExpertsBackend) -> None:
    inputs = _inputs("plain", torch.float32)
    slots = len(inputs.params.down_projs)
    for wrong in (slots, -2):
        ids = inputs.slot_ids.clone()
        ids[1, 0] = wrong
        with pytest.raises(ValueError, match=rf"slot_ids has {wrong}; ids are 0 to {slots - 1}, or -1 for no route"):
            backend(inputs.tokens, ids, inputs.weights, inputs.params)
    mixed = inputs.params._replace(down_projs=inputs.params.down_projs.double())
    for tokens, params, text in (
        (inputs.tokens, mixed, r"down_projs must be torch\.float32 as tokens, not torch\.float64"),
        (inputs.tokens.bfloat16(), inputs.params, r"gate_and_up_projs must be torch\.bfloat16 as tokens"),
    ):
        with pytest.raises(ValueError, match=text):
            backend(tokens, inputs.slot_ids, inputs.weights, params)


def test_auto_takes_cpu_on_a_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = _inputs("plain", dtype)
        assert choose_backend("auto", inputs.tokens, inputs.params) is cpu


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'abacus'.*auto, cpu, eager, grouped_mm"):
        GroupedExperts(2, 8, 8, "abacus")


@pytest.mark.parametrize(("name", "backend"), [(name, each) for name, each in BACKENDS if name != "eager"])
def test_keeps_tokens_first_products_and_indices_for_the_backward_pass(name: str, backend: ExpertsBackend) -> None:
    """In bf16 `2 T H + 4 T K I` bytes of activations; of a route 8 bytes of order and 4 of weight."""
    num_tokens, top_k, num_slots, hidden_size, intermediate_size = 256, 4, 8, 128, 64
    tokens = torch.randn(num_tokens, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(num_tokens, top_k, requires_grad=True)
    shapes = (num_slots, hidden_size, 2 * intermediate_size), (num_slots, intermediate_size, hidden_size)
    params = ExpertParams(*(torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes))
    slot_ids = _routes(num_tokens, top_k, num_slots, "any")
    kept = kept_bytes(lambda: backend(tokens, slot_ids, weights, params), params[:2])  # type: ignore[arg-type]
    activations = 2 * num_tokens * hidden_size + 4 * num_tokens * top_k * intermediate_size
    assert 0 <= kept - (activations + 12 * num_tokens * top_k + 8 * num_slots) <= 8, name


@pytest.mark.parametrize(("name", "backend"), [(name, each) for name, each in BACKENDS if name != "eager"])
@pytest.mark.parametrize("formula", [SWIGLU, GPT_OSS])
def test_is_a_sound_operator(name: str, backend: ExpertsBackend, formula: ExpertsFormula) -> None:
    """Its schema, its shapes without data and its gradients are what torch.compile and tracing rely on."""
    kind, *static = name.split(", ")
    op = getattr(torch.ops.crossdock, "_".join([*static, kind, "experts"])).default
    assert op in EXPERTS_OPS
    inputs = _inputs("missing routes", torch.float32, formula=formula, bias=formula is GPT_OSS)
    leaves = [tensor if tensor is None else tensor.requires_grad_() for tensor in inputs.params]
    settings = (formula.activation, formula.gated, formula.limit, formula.up_offset, formula.weight_on, ())
    arguments = (inputs.tokens.requires_grad_(), inputs.slot_ids, inputs.weights.requires_grad_(), *leaves, *settings)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    results = torch.library.opcheck(op, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("name", "backend"), [(name, each) for name, each in BACKENDS if name != "eager"])
def test_gradients_lie_in_memory_as_parameters_do(name: str, backend: ExpertsBackend) -> None:
    """transformers has its weights transposed; a gradient of another layout would be copied."""
    inputs = _inputs("plain", torch.float32)
    expected = _evaluate(backend, *inputs)
    params = ExpertParams(*(param.mT.contiguous().mT for param in inputs.params[:2]))  # type: ignore[union-attr]
    results = _evaluate(backend, *inputs._replace(params=params))
    for parameter in ("gate_and_up_projs", "down_projs"):
        assert results[parameter].stride() == getattr(params, parameter).stride(), name
        torch.testing.assert_close(results[parameter], expected[parameter])


@pytest.mark.parametrize(("name", "backend"), [(name, each) for name, each in BACKENDS if name != "eager"])
def test_compiles_whole(name: str, backend: ExpertsBackend) -> None:
    """A function of one's own around a backend is one graph, and gives the same numbers."""
    inputs = _inputs("missing routes", torch.float32)
    for param in inputs.params[:2]:
        param.requires_grad_()  # type: ignore[union-attr]

    def call(tokens: Tensor, slot_ids: Tensor, weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return backend(tokens * 2, slot_ids, weights, ExpertParams(first, second)) * 2

    arguments = (inputs.tokens, inputs.slot_ids, inputs.weights, *inputs.params[:2])
    compiled: Any = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*arguments), call(*arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=name)
    grads = [torch.autograd.grad(y.sum(), inputs.params[:2]) for y in (ours, theirs)]  # type: ignore[arg-type]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6, msg=name)


def test_matrices_that_grouped_mm_cannot_take_are_for_eager() -> None:
    inputs = _inputs("plain", torch.float32)
    first, second = inputs.params[:2]
    assert first is not None
    off = first.new_zeros(*first.shape[:2], first.shape[2] + 1)[..., :-1].copy_(first)
    params = ExpertParams(off, second)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gate_and_up_projs has strides"):
        grouped_mm(inputs.tokens, inputs.slot_ids, inputs.weights, params)
    assert choose_backend("grouped_mm", inputs.tokens, params) is eager
    transposed = ExpertParams(*(param.mT.contiguous().mT for param in inputs.params[:2]))  # type: ignore[union-attr]
    assert choose_backend("grouped_mm", inputs.tokens, transposed) is grouped_mm
