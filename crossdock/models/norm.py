"""RMSNorm that computes in at least fp32: transformers' own computes in fp32 even for float64 models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def build_norm(weight: nn.Parameter, eps: float, kernels: Kernels) -> nn.Module:
    """A norm with `weight`: `RMSNorm`, or Liger's, which computes the same in fp32."""
    if kernels == "none":
        return RMSNorm(weight, eps)
    from liger_kernel.transformers import LigerRMSNorm  # pyright: ignore[reportMissingImports]

    norm = LigerRMSNorm(len(weight), eps=eps)
    norm.weight = weight
    return norm
