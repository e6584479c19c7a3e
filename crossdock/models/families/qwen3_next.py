"""Qwen3-Next: Qwen2-MoE's blocks between linear and gated attention; norms with weights around 0."""

from __future__ import annotations

from crossdock.models.families.qwen2 import Qwen2
from crossdock.models.norm import NormFormula

__all__ = ["Qwen3Next"]


class Qwen3Next(Qwen2):
    """Adapter of the family `qwen3_next`."""

    name = "qwen3_next"
    attention = ("self_attn", "linear_attn")
    model_type = "qwen3_next"
    block = "Qwen3NextSparseMoeBlock"
    norm = "Qwen3NextRMSNorm"
    tensor_whole = ("linear_attn",)
    norm_formula = NormFormula(offset=1.0, rounds_first=False)
