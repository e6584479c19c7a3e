"""What autocast computes in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_dtype"]


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a product takes `tensor` in: autocast's where it is on, but for float64, which it leaves alone."""
    device = tensor.device.type
    cast = tensor.is_floating_point() and tensor.dtype != torch.float64
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast and on else tensor.dtype
