"""RMSNorm that computes in at least fp32: transformers' own computes in fp32 even for float64 models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from crossdock.models.family import Kernels

__all__ = ["RMSNorm", "build_norm"]


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in fp32 or float64 (arXiv 1910.07467, eq. 4).

    The normalised value is rounded to the input's dtype before it is scaled, as transformers does.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., H] -> [..., H]`."""
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class _RMSNorm(Function):
    """The formula with its gradients by hand: a third of the passes over memory that autograd makes.

    With `r = 1 / sqrt(mean(x^2) + eps)` and the output's gradient `g`: `dw = sum_n g x r` and
    `dx = r (g w) - x r^3 (g x . w) / H`. Only `x` and `r` are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normalised = (wide * scale).to(x.dtype)
        return normalised.mul_(weight) if weight.dtype == x.dtype else normalised * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, grad = (tensor.reshape(-1, size).to(wide) for tensor in (x, grads[0]))
        scale, wide_weight = scale.reshape(-1, 1), weight.to(wide)
        product = grad * rows
        grad_weight = torch.mv(product.t(), scale[:, 0])
        along = torch.mv(product, wide_weight)[:, None]
        grad_x = torch.mul(grad, wide_weight, out=product).mul_(scale)
        grad_x.addcmul_(rows, along.mul_(scale**3).div_(-size))
        return grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype), None


def build_norm(weight: nn.Parameter, eps: float, kernels: Kernels) -> nn.Module:
    """A norm with `weight`: `RMSNorm`, or Liger's, which computes the same in fp32."""
    if kernels == "none":
        return RMSNorm(weight, eps)
    from liger_kernel.transformers import LigerRMSNorm  # pyright: ignore[reportMissingImports]

    norm = LigerRMSNorm(len(weight), eps=eps)
    norm.weight = weight
    return norm
