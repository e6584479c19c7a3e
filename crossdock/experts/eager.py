"""A readable loop over the experts: the oracle that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.experts.experts import ExpertParams, swiglu

__all__ = ["eager"]


def eager(tokens: Tensor, slot_ids: Tensor, weights: Tensor, params: ExpertParams) -> Tensor:
    """Contract and shapes: `ExpertsBackend`. Any floating dtype, float64 too, on any device."""
    y = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, torch.float32))
    # `unbind`, not `w[e]`: the backward of indexing fills a whole zero tensor for every expert.
    for slot, (gate_and_up_proj, down_proj) in enumerate(zip(*map(torch.unbind, params), strict=True)):
        row, k = (slot_ids == slot).nonzero(as_tuple=True)
        activated = swiglu(tokens[row] @ gate_and_up_proj, weights[row, k])
        y = y.index_add(0, row, (activated @ down_proj).to(y.dtype))
    return y.to(tokens.dtype)
