"""Experts through `torch.nn.functional.grouped_mm`: all experts' products in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.experts.experts import ExpertParams, swiglu

__all__ = ["grouped_mm", "grouped_mm_problem"]

_ALIGNMENT_BYTES = 16


def grouped_mm(tokens: Tensor, slot_ids: Tensor, weights: Tensor, params: ExpertParams) -> Tensor:
    """Contract and shapes: `ExpertsBackend`. fp32, bf16 and fp16.

    Only real routes get a row, so none lies past the last offset, where the product leaves uninitialised memory.

    Raises:
        ValueError: for float64, or where `H` or `I` give rows that are no multiple of 16 bytes.
    """
    if problem := grouped_mm_problem(tokens, params):
        raise ValueError(f"experts backend 'grouped_mm' {problem}; use 'eager'")
    num_slots = len(params.gate_and_up_projs)
    slots = slot_ids.flatten()
    route = (slots >= 0).nonzero().squeeze(1)
    route = route[slots[route].argsort(stable=True)]
    row = route // slot_ids.shape[1]
    counts = torch.zeros(num_slots, dtype=torch.int64, device=slots.device)
    offsets = counts.scatter_add_(0, slots[route], torch.ones_like(route)).cumsum(0).to(torch.int32)

    gate_and_up = F.grouped_mm(tokens[row], params.gate_and_up_projs, offs=offsets)
    activated = swiglu(gate_and_up, weights.flatten()[route])
    outputs = F.grouped_mm(activated, params.down_projs, offs=offsets)
    # Each route has a row of its own, so that a token's routes are summed in one order on every device.
    routes = tokens.new_zeros(slots.numel(), tokens.shape[1]).index_copy(0, route, outputs)
    y = routes.view(*slot_ids.shape, tokens.shape[1]).sum(dim=1, dtype=torch.promote_types(tokens.dtype, torch.float32))
    return y.to(tokens.dtype)


def grouped_mm_problem(tokens: Tensor, params: ExpertParams) -> str | None:
    """Why `grouped_mm` cannot compute these `tokens [U, H]` and `params`, or `None` where it can."""
    if tokens.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 or float16, not {tokens.dtype}"
    for name, size in (("hidden_size", tokens.shape[1]), ("intermediate_size", params.down_projs.shape[1])):
        if size * tokens.dtype.itemsize % _ALIGNMENT_BYTES:
            return f"needs rows of a multiple of {_ALIGNMENT_BYTES} bytes; {name} = {size} in {tokens.dtype} is none"
    return None
