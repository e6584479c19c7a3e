"""The Newton-Schulz iteration of Muon, for many matrices at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthogonalise"]

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_LEAST_NORM = 1e-7


def orthogonalise(matrices: Tensor) -> Tensor:
    """About `U V^T` for each matrix `U S V^T`; singular values end between 0.7 and 1.2, 0 stays 0.

    `X <- a X + (b G + c G^2) X` with `G = X X^T`, five times, from `X / |X|`: `a s + b s^3 + c s^5` of every singular
    value `s` (Keller Jordan, https://kellerjordan.github.io/posts/muon/).

    Args:
        matrices: `[N, A, B]`, in the dtype of the iteration.

    Returns:
        `[N, A, B]`, likewise; the result of a matrix and that of its transpose are transposes.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.contiguous() if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_LEAST_NORM)
    for _ in range(_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x.mT if tall else x
