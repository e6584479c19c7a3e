"""Experts with adapters compute what merged weights do, and an adapter's gradient is the merged weight's, projected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossdock.experts import (
    GPT_OSS,
    SWIGLU,
    ExpertAdapters,
    ExpertParams,
    ExpertsFormula,
    GroupedExperts,
    eager_lora,
    grouped_lora,
    lora_experts,
)
from tests.experts.oracle import experts_forward, experts_gradients

SCALE = 0.7
FORMULAS = {
    "swiglu": (SWIGLU, False),
    "gpt-oss": (GPT_OSS, True),
    "clamped": (ExpertsFormula("quick_gelu", limit=0.5, up_offset=1.0), True),
    "ungated": (ExpertsFormula("relu_squared", gated=False), False),
    "weight on the input": (ExpertsFormula(weight_on="input"), True),
}
# name: (U, K, slots, which routes)
ROUTES = {
    "plain": (33, 2, 5, "any"),
    "most slots idle": (20, 2, 12, "first three"),
    "missing routes": (40, 4, 6, "some"),
    "no routes": (8, 3, 4, "none"),
    "no tokens": (0, 3, 4, "any"),
}
WAYS: dict[str, Callable[..., Tensor]] = {
    "eager": eager_lora,
    "grouped": grouped_lora,
    "static": partial(grouped_lora, static=True),
}
H, I = 16, 24


def _inputs(
    routes: str, dtype: torch.dtype, formula: ExpertsFormula = SWIGLU, *, bias: bool = False, rank: int = 3
) -> dict[str, Any]:
    """Weights without a route are not 0; nor is any adapter."""
    num_tokens, top_k, slots, pattern = ROUTES[routes]
    torch.manual_seed(0)
    scores = torch.rand(num_tokens, slots)
    if pattern == "first three":
        scores[:, 3:] -= 2
    slot_ids = scores.topk(top_k, dim=1).indices
    if pattern == "some":
        slot_ids[torch.rand(num_tokens, top_k) < 0.6] = -1
        slot_ids[::5] = -1
    elif pattern == "none":
        slot_ids.fill_(-1)
    width = formula.width(I)
    shapes = {
        "gate_and_up_projs": (slots, H, width),
        "down_projs": (slots, I, H),
        **({"gate_and_up_bias": (slots, width), "down_bias": (slots, H)} if bias else {}),
        "gate_and_up_lora_a": (slots, H, rank),
        "gate_and_up_lora_b": (slots, width, rank),
        "down_lora_a": (slots, I, rank),
        "down_lora_b": (slots, H, rank),
    }
    tensors = {name: (torch.randn(shape, dtype=torch.float64) * 0.4).to(dtype) for name, shape in shapes.items()}
    return {
        "tokens": torch.randn(num_tokens, H, dtype=torch.float64).to(dtype),
        "slot_ids": slot_ids,
        "weights": torch.rand(num_tokens, top_k, dtype=torch.promote_types(dtype, torch.float32)) + 0.1,
        "grad_y": torch.randn(num_tokens, H, dtype=torch.float64).to(dtype),
        "formula": formula,
        **tensors,
    }


def _evaluate(way: Callable[..., Tensor], inputs: dict[str, Any], *, frozen: bool = True) -> dict[str, Tensor]:
    """The output and the gradients of tokens, weights and adapters; of all parameters where they are not frozen."""
    leaves = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    slot_ids, grad_y = leaves.pop("slot_ids"), leaves.pop("grad_y")
    trained = {name: leaf for name, leaf in leaves.items() if not frozen or name not in ExpertParams._fields}
    for leaf in trained.values():
        leaf.requires_grad_()
    params = ExpertParams(*(leaves.get(name) for name in ExpertParams._fields))  # type: ignore[arg-type]
    adapters = ExpertAdapters(*(leaves[name] for name in ExpertAdapters._fields))
    y = way(leaves["tokens"], slot_ids, leaves["weights"], params, adapters, SCALE, inputs["formula"])
    assert y.dtype == inputs["tokens"].dtype
    grads = torch.autograd.grad(y, list(trained.values()), grad_y)  # raises where one is not in the graph
    return {"y": y.detach()} | dict(zip(trained, grads, strict=True))


def _oracle(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """By merged weights, in float64 numpy: `dA = s dW B` and `dB = s dW^T A` for `W + s A B^T`."""
    held: dict[str, Any] = {
        name: value.double().numpy() if isinstance(value, Tensor) and name != "slot_ids" else value
        for name, value in inputs.items()
    }
    pairs = {"gate_and_up_projs": "gate_and_up_lora", "down_projs": "down_lora"}
    merged = [held[name] + SCALE * held[f"{pair}_a"] @ held[f"{pair}_b"].swapaxes(1, 2) for name, pair in pairs.items()]
    arrays = held["tokens"], inputs["slot_ids"].numpy(), held["weights"], merged[0], merged[1]
    biases = held.get("gate_and_up_bias"), held.get("down_bias"), inputs["formula"]
    grads = experts_gradients(held["grad_y"], *arrays, *biases)
    expected = {
        "y": experts_forward(*arrays, *biases),
        **{name: grad for name, grad in grads._asdict().items() if grad is not None},
    }
    for name, pair in pairs.items():
        expected[f"{pair}_a"] = SCALE * expected[name] @ held[f"{pair}_b"]
        expected[f"{pair}_b"] = SCALE * expected[name].swapaxes(1, 2) @ held[f"{pair}_a"]
    return expected


def _assert_close(ours: dict[str, Tensor], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name, tensor in ours.items():
        error = np.linalg.norm(tensor.double().numpy() - expected[name])
        assert error <= tolerance * np.linalg.norm(expected[name]), f"{name}: {error}"


@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula_equals_merged_weights(name: str) -> None:
    formula, bias = FORMULAS[name]
    for routes in ROUTES:
        inputs = _inputs(routes, torch.float64, formula, bias=bias)
        _assert_close(_evaluate(eager_lora, inputs), _oracle(inputs), 1e-12)
        for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 5e-2)):
            inputs = _inputs(routes, dtype, formula, bias=bias)
            expected = _oracle(inputs)
            for way in WAYS.values():
                _assert_close(_evaluate(way, inputs), expected, tolerance)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_every_rank_and_weights_that_are_not_frozen(rank: int) -> None:
    inputs = _inputs("missing routes", torch.float32, *FORMULAS["gpt-oss"][:1], bias=True, rank=rank)
    for way in WAYS.values():
        results = _evaluate(way, inputs, frozen=False)
        assert len(results) == 1 + 2 + 4 + 4
        _assert_close(results, _oracle(inputs), 5e-6)


@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_route_is_not_read_and_gets_zeros(way: str) -> None:
    inputs = _inputs("missing routes", torch.float32)
    slot_ids = inputs["slot_ids"]
    slot_ids[slot_ids == 3] = -1
    expected = _evaluate(WAYS[way], inputs)
    without = (slot_ids < 0).all(dim=1)
    assert without.any()
    for name in ("tokens", "grad_y"):
        inputs[name][without] = torch.nan
    inputs["weights"][slot_ids < 0] = torch.nan
    for name in (*ExpertParams._fields[:2], *ExpertAdapters._fields):
        inputs[name][3] = torch.nan
    for name, value in _evaluate(WAYS[way], inputs).items():
        assert torch.equal(value, expected[name]), name
        if name in ExpertAdapters._fields:
            assert (value[3] == 0).all()
            assert value[:3].flatten(1).any(dim=1).all()
    assert (expected["y"][without] == 0).all()
    assert (expected["tokens"][without] == 0).all()


class _Products(TorchDispatchMode):
    """Counts grouped products by the width of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._grouped_mm.default:
            self.shapes.append(tuple(result.shape))
        return result


def test_frozen_weights_get_no_gradient_product() -> None:
    inputs = _inputs("plain", torch.float32)
    with _Products() as frozen:
        _evaluate(grouped_lora, inputs)
    with _Products() as trained:
        _evaluate(grouped_lora, inputs, frozen=False)
    whole = {(5, H, 2 * I), (5, I, H), (5, 2 * I, H), (5, H, I)}
    assert whole.isdisjoint(frozen.shapes)
    assert len(whole.intersection(trained.shapes)) == 2, "the test sees such products where there are any"
    assert len(frozen.shapes) == 6 + 6 + 4, "forward, inputs' gradients, adapters' gradients"


def test_the_module_begins_without_an_effect_and_follows_its_adapters() -> None:
    torch.manual_seed(0)
    experts = GroupedExperts(6, H, I, bias=True)
    inputs = _inputs("missing routes", torch.float32)
    given = inputs["tokens"], inputs["slot_ids"], inputs["weights"]
    before = experts(*given)
    experts.add_lora(rank=3, alpha=6)
    torch.testing.assert_close(experts(*given), before)
    adapters = experts.adapters()
    assert adapters is not None
    with torch.no_grad():
        for adapter in adapters:
            adapter.normal_()
    expected = eager_lora(*given, ExpertParams(*list(experts.parameters())[:4]), adapters, 2.0)
    assert not torch.allclose(expected, before, rtol=0.1)
    for experts.backend, experts.static_shapes in (("auto", False), ("eager", False), ("auto", True)):
        torch.testing.assert_close(experts(*given), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(*given).dtype == torch.bfloat16


def test_what_cannot_be_grouped_is_computed_in_turn_or_refused() -> None:
    inputs = _inputs("plain", torch.float64)
    given = inputs["tokens"], inputs["slot_ids"], inputs["weights"]
    params = ExpertParams(inputs["gate_and_up_projs"], inputs["down_projs"])
    adapters = ExpertAdapters(*(inputs[name] for name in ExpertAdapters._fields))
    assert torch.equal(lora_experts(*given, params, adapters, 1.0), eager_lora(*given, params, adapters, 1.0))
    with pytest.raises(ValueError, match="static_shapes"):
        lora_experts(*given, params, adapters, 1.0, static=True)
    with pytest.raises(ValueError, match="float64"):
        grouped_lora(*given, params, adapters, 1.0)
    with pytest.raises(ValueError, match=r"down_lora_b must be torch\.float64"):
        lora_experts(*given, params, adapters._replace(down_lora_b=adapters.down_lora_b.float()), 1.0)
