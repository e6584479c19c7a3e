"""RMSNorm's gradients are written by hand: they must be those of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crossdock.models.norm import RMSNorm

EPS = 1e-2


def _formula(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def _norm(weight: Tensor) -> RMSNorm:
    return RMSNorm(nn.Parameter(weight.clone()), EPS)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4, 6), (0, 6), (1, 6), (6,)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = _norm(torch.randn(6, dtype=torch.float64))
    torch.testing.assert_close(norm(x), _formula(x, norm.weight))
    if x.numel():
        assert torch.autograd.gradcheck(norm, x)
    (2 * norm(x)).sum().backward()
    exact = torch.autograd.grad((2 * _formula(x, norm.weight)).sum(), norm.weight)[0]
    assert norm.weight.grad is not None
    torch.testing.assert_close(norm.weight.grad, exact)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_near_the_formula_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    # Strided: a part of a wider projection, as heads are.
    x = torch.randn(3, 7, 130, dtype=dtype)[..., 1:-1].requires_grad_()
    norm = _norm(torch.randn(128, dtype=dtype))
    grad = torch.randn(3, 7, 128, dtype=dtype)
    y = norm(x)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, (x, norm.weight), grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, norm.weight)]
    exact = _formula(*wide)
    pairs = zip((y, *grads), (exact, *torch.autograd.grad(exact, wide, grad.double())), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
