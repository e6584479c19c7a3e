"""Gated activations times routing weight: values and all gradients beside float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crossdock.experts.formula import GPT_OSS, SWIGLU, ExpertsFormula
from crossdock.kernels import (
    FusedActivation,
    fused_quick_geglu_prob,
    fused_silu_gate_prob,
    get_fused_activation_fn,
    quick_geglu_prob_reference,
    silu_gate_prob_reference,
)
from tests.kernels.saving import kept_tensors


@dataclass(frozen=True)
class Form:
    fused: FusedActivation
    reference: FusedActivation
    formula: ExpertsFormula


FORMS = {
    "silu": Form(fused_silu_gate_prob, silu_gate_prob_reference, SWIGLU),
    "quick_geglu": Form(fused_quick_geglu_prob, quick_geglu_prob_reference, GPT_OSS),
}
# A block is 8 x 256: less, exactly one, and no multiple in either direction; nothing at all.
SHAPES = [(1, 1), (8, 256), (13, 300), (20, 513), (0, 64), (3, 0)]
# Half a unit in the last place, relative.
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
dtypes = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def draw(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate, up, weight and the gradient of the output; many values beyond the clamps."""
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up, grad = (torch.randn(shape, generator=generator) * scale for scale in (6, 6, 1))
    prob = torch.rand(shape[0], generator=generator)
    return gate.to(device, dtype), up.to(device, dtype), prob.to(device), grad.to(device, dtype)


def oracle(form: Form, gate: Tensor, up: Tensor, prob: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of gate, up and weight by the experts' own formula in float64, on the CPU."""
    inputs = [tensor.detach().cpu().double().requires_grad_() for tensor in (gate, up, prob)]
    out = form.formula.activate(inputs[0], inputs[1]) * inputs[2].view(-1, 1)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.cpu().double())]


def assert_rounded_once(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Within half a unit in the last place of `dtype`, plus what fp32 arithmetic adds."""
    assert got.dtype == dtype
    # The smallest numbers of float16 have a fixed distance, 2^-24.
    bound = (ROUNDING[dtype] + 2e-6) * wanted.abs() + 2e-5
    excess = ((got.cpu().double() - wanted).abs() - bound).amax() if got.numel() else torch.zeros(())
    assert excess <= 0, f"off by {excess:.2e} beyond one rounding"


@forms
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_all_gradients_are_those_of_float64_rounded_once(
    form: Form, dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    gate, up, prob, grad = draw(shape, dtype, device)
    inputs = [tensor.requires_grad_() for tensor in (gate, up, prob)]
    out = form.fused(gate, up, prob)
    grads = torch.autograd.grad(out, inputs, grad)
    wanted = oracle(form, gate, up, prob, grad)
    for got, want in zip([out, *grads[:2]], wanted, strict=False):
        assert_rounded_once(got, want, dtype)
    torch.testing.assert_close(grads[2].cpu().double(), wanted[3], rtol=1e-4, atol=1e-3)


@forms
@pytest.mark.parametrize("column", [False, True], ids=["[N]", "[N, 1]"])
def test_halves_side_by_side_strided_or_apart_give_the_same_bits(
    form: Form, column: bool, device: torch.device
) -> None:
    gate, up, prob, grad = draw((11, 270), torch.bfloat16, device)
    prob = prob.view(-1, 1) if column else prob
    results = []
    for layout in ("apart", "side by side", "chunks", "columns"):
        both = torch.cat([gate, up], dim=1).requires_grad_()
        weight = prob.clone().requires_grad_()
        first, second = both.chunk(2, dim=1)
        if layout == "side by side":
            out = form.fused(both, prob=weight)
        elif layout == "apart":
            out = form.fused(first.contiguous(), second.contiguous(), weight)
        elif layout == "columns":
            out = form.fused(first.t().contiguous().t(), second.t().contiguous().t(), weight)
        else:
            out = form.fused(first, second, weight)
        both_grad, weight_grad = torch.autograd.grad(out, (both, weight), grad)
        assert weight_grad.shape == prob.shape
        results.append((out, both_grad, weight_grad))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@forms
def test_no_weight_is_a_weight_of_one(form: Form, device: torch.device) -> None:
    gate, up, prob, grad = draw((9, 40), torch.float32, device)
    gate.requires_grad_()
    results = []
    for weight in (None, torch.ones_like(prob)):
        out = form.fused(gate, up, weight)
        results.append((out, *torch.autograd.grad(out, gate, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@forms
@pytest.mark.parametrize("prob_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_weights_gradient_has_its_dtype_and_ignores_an_expanded_gradients_strides(
    form: Form, prob_dtype: torch.dtype, device: torch.device
) -> None:
    gate, up, prob, _ = draw((10, 33), torch.float32, device)
    prob = prob.to(prob_dtype).requires_grad_()
    form.fused(gate, up, prob).sum().backward()
    wanted = oracle(form, gate, up, prob, torch.ones_like(gate))[3]
    assert prob.grad is not None
    assert prob.grad.dtype == prob_dtype
    tolerance = 1e-4 if prob_dtype == torch.float32 else 2**-8
    torch.testing.assert_close(prob.grad.cpu().double(), wanted, rtol=tolerance, atol=1e-3)


@forms
def test_the_backward_pass_keeps_the_inputs_alone(form: Form, device: torch.device) -> None:
    gate, up, prob, _ = draw((16, 48), torch.bfloat16, device)
    inputs = [tensor.requires_grad_() for tensor in (gate, up, prob)]
    with kept_tensors() as kept:
        form.fused(*inputs)
    assert sorted(kept) == sorted(tensor.data_ptr() for tensor in inputs)


@forms
def test_nan_flows_through_output_and_gradients(form: Form, device: torch.device) -> None:
    for place in (0, 1):
        inputs = [torch.ones(2, 4, device=device), torch.ones(2, 4, device=device)]
        inputs[place][0, 1] = float("nan")
        inputs = [tensor.requires_grad_() for tensor in inputs]
        out = form.fused(inputs[0], inputs[1], torch.ones(2, device=device))
        grads = torch.autograd.grad(out.sum(), inputs)
        for tensor in (out, grads[1 - place]):
            assert tensor.isnan().nonzero().tolist() == [[0, 1]]


@forms
def test_gradients_of_float64_are_exact(form: Form) -> None:
    gate, up, prob, _ = draw((5, 7), torch.float64, torch.device("cpu"))
    inputs = [tensor.double().requires_grad_() for tensor in (gate, up, prob)]
    assert torch.autograd.gradcheck(form.fused, inputs)


@forms
def test_the_reference_is_the_experts_formula(form: Form) -> None:
    gate, up, prob, grad = draw((6, 10), torch.float64, torch.device("cpu"))
    inputs = [tensor.double().requires_grad_() for tensor in (gate, up, prob)]
    out = form.reference(*inputs)
    for got, want in zip(
        [out, *torch.autograd.grad(out, inputs, grad)], oracle(form, gate, up, prob, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_function_is_chosen_by_name() -> None:
    assert get_fused_activation_fn(True) is fused_silu_gate_prob
    assert get_fused_activation_fn(False) is silu_gate_prob_reference
    assert get_fused_activation_fn(True, "quick_geglu") is fused_quick_geglu_prob
    assert get_fused_activation_fn(False, "quick_geglu") is quick_geglu_prob_reference
    with pytest.raises(ValueError, match="activation 'gelu' is unknown; valid: silu, quick_geglu"):
        get_fused_activation_fn(True, "gelu")  # pyright: ignore[reportArgumentType]


@forms
def test_wrong_shapes_are_refused(form: Form) -> None:
    gate = torch.ones(4, 6)
    for arguments, name in (
        ((torch.ones(4, 5),), "gate"),
        ((torch.ones(2, 4, 6),), "gate"),
        ((gate, torch.ones(4, 5)), "up"),
        ((gate, gate.half()), "up"),
        ((gate, gate, torch.ones(5)), "prob"),
        ((gate, gate, torch.ones(1, 4)), "prob"),
        ((gate, gate, torch.ones(4, dtype=torch.int64)), "prob"),
    ):
        for function in (form.fused, form.reference):
            with pytest.raises(ValueError, match=name):
                function(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_two_to_the_31_values(device: torch.device) -> None:
    width, rows = 1024, 2**21 + 8
    both = torch.zeros(rows, 2 * width, dtype=torch.bfloat16, device=device)
    both[-8:].normal_()
    both.requires_grad_()
    prob = torch.ones(rows, device=device)
    out = fused_silu_gate_prob(both, prob=prob)
    (grad,) = torch.autograd.grad(out, both, torch.ones_like(out))
    last = both[-8:].detach().clone().requires_grad_()
    wanted = fused_silu_gate_prob(last, prob=prob[-8:])
    assert torch.equal(out[-8:], wanted)
    assert torch.equal(grad[-8:], torch.autograd.grad(wanted, last, torch.ones_like(wanted))[0])
