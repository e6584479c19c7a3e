"""Weights that are no numbers, found while they are loaded: one pass over what a rank has read."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["what_is_not_finite"]


def what_is_not_finite(tensor: Tensor, *, may_be_infinite: bool = False) -> str:
    """What of NaN and infinity a tensor holds, in words; empty where it holds neither, or none that it may not.

    Args:
        tensor: of any dtype; one of whole numbers holds neither.
        may_be_infinite: only NaN counts, as in a mask.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    # Both are NaN where any value is.
    least, most = torch.stack(torch.aminmax(tensor.detach())).tolist()
    if least != least:
        return "holds NaN"
    return "holds infinity" if not may_be_infinite and float("inf") in (-least, most) else ""
