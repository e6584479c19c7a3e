"""RMSNorm that computes in at least fp32: transformers' own computes in fp32 even for float64 models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["Kernels", "NormFormula", "RMSNorm", "build_norm"]

Kernels = Literal["none", "liger"]


@dataclass(frozen=True)
class NormFormula:
    """`(weight + offset) * x / sqrt(mean(x^2) + eps)` (arXiv 1910.07467, eq. 4).

    Attributes:
        offset: 1 where weights are kept around 0.
        rounds_first: whether the normalised value is rounded to the input's dtype before it is scaled.
    """

    offset: float = 0.0
    rounds_first: bool = True


class RMSNorm(nn.Module):
    """`NormFormula` over the last dimension, in fp32 or float64."""

    def __init__(self, weight: nn.Parameter, eps: float, formula: NormFormula = NormFormula()) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        """`[..., H] -> [..., H]`."""
        return _RMSNorm.apply(x, self.weight, self.eps, self.formula)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class _RMSNorm(Function):
    """The formula with its gradients by hand: a third of the passes over memory that autograd makes.

    With `r = 1 / sqrt(mean(x^2) + eps)`, `w` the weight plus its offset and the output's gradient `g`:
    `dw = sum_n g x r` and `dx = r (g w) - x r^3 (g x . w) / H`. Only `x` and `r` are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, formula: NormFormula) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = formula.offset
        normalised = wide * scale
        if not formula.rounds_first:
            return normalised.mul_(weight.to(wide.dtype) + formula.offset).to(x.dtype)
        normalised, weight = normalised.to(x.dtype), weight + formula.offset if formula.offset else weight
        return normalised.mul_(weight) if weight.dtype == x.dtype else normalised * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, grad = (tensor.reshape(-1, size).to(wide) for tensor in (x, grads[0]))
        scale, wide_weight = scale.reshape(-1, 1), weight.to(wide) + ctx.offset
        product = grad * rows
        grad_weight = torch.mv(product.t(), scale[:, 0])
        along = torch.mv(product, wide_weight)[:, None]
        grad_x = torch.mul(grad, wide_weight, out=product).mul_(scale)
        grad_x.addcmul_(rows, along.mul_(scale**3).div_(-size))
        return grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype), None, None


def build_norm(norm: Any, formula: NormFormula, kernels: Kernels) -> nn.Module:
    """A norm with the weight of transformers' `norm`: `RMSNorm`, or Liger's, which computes the same in fp32."""
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    if kernels == "none":
        return RMSNorm(norm.weight, eps, formula)
    from liger_kernel.transformers import LigerRMSNorm  # pyright: ignore[reportMissingImports]

    casting = "llama" if formula.rounds_first else "gemma"
    built = LigerRMSNorm(len(norm.weight), eps=eps, offset=formula.offset, casting_mode=casting)
    built.weight = norm.weight
    return built
