"""A readable loop over the experts: the oracle that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from crossdock.experts.checks import check_dtypes, check_ids
from crossdock.experts.experts import ExpertParams
from crossdock.experts.formula import SWIGLU, ExpertsFormula

__all__ = ["eager"]


def eager(
    tokens: Tensor, slot_ids: Tensor, weights: Tensor, params: ExpertParams, formula: ExpertsFormula = SWIGLU
) -> Tensor:
    """Contract and shapes: `ExpertsBackend`. Any floating dtype, float64 too, on any device."""
    check_dtypes(tokens, params)
    check_ids(slot_ids, len(params.down_projs))
    wide = torch.promote_types(tokens.dtype, torch.float32)
    y = torch.zeros_like(tokens, dtype=wide)
    num_slots = len(params.down_projs)
    # `unbind`, not `w[e]`: the backward of indexing fills a whole zero tensor for every expert.
    per_slot = [[None] * num_slots if param is None else param.unbind() for param in params]
    for slot, (gate_and_up_proj, down_proj, gate_and_up_bias, down_bias) in enumerate(zip(*per_slot, strict=True)):
        row, k = (slot_ids == slot).nonzero(as_tuple=True)
        x, weight = tokens[row], weights[row, k, None]
        if formula.weight_on == "input":
            x = (x * weight).to(x.dtype)
        pre_activation = x @ gate_and_up_proj
        if gate_and_up_bias is not None:
            pre_activation = pre_activation + gate_and_up_bias
        h = formula.activate(*formula.halves(pre_activation.to(wide)))
        if formula.weight_on == "output":
            h = h * weight
        out = (h.to(tokens.dtype) @ down_proj).to(wide)
        if down_bias is not None:
            out = out + (down_bias * weight if formula.weight_on == "output" else down_bias)
        y = y.index_add(0, row, out)
    return y.to(tokens.dtype)
