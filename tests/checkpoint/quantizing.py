"""Weights in FP8 and MXFP4, and what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

__all__ = ["quantize_fp8", "quantize_mxfp4"]


def quantize_fp8(tensors: dict[str, Tensor], block: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All experts' matrices and attention's in E4M3 with factors; and what these stand for, in float64."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            stored[name] = meant[name] = tensor
            continue
        rows, columns = (-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
        scales = 0.001 + torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name)))
        of_row, of_column = (torch.arange(size) // step for size, step in zip(tensor.shape, block, strict=True))
        factors = scales[of_row][:, of_column]
        stored[name] = (tensor / factors).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        meant[name] = (stored[name].double() * factors.double()).float()
    return stored, meant


def quantize_mxfp4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random halves of bytes and powers of two in place of the experts; and what transformers says they stand for."""
    generator = torch.Generator().manual_seed(0)
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = meant[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        shape = (experts, columns, rows // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return stored, meant
