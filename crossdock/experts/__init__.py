"""Experts: their parameters and the backends that compute with them."""

from crossdock.experts.autocast import autocast_dtype
from crossdock.experts.choice import AUTO, EXPERTS_BACKENDS, backend_problem, choose_backend, pick_backend
from crossdock.experts.clock import ExpertClock
from crossdock.experts.cpu import cpu
from crossdock.experts.eager import eager
from crossdock.experts.experts import ComputeRows, ExpertAdapters, ExpertParams, ExpertsBackend, ForeignExperts
from crossdock.experts.formula import (
    ACTIVATIONS,
    GPT_OSS,
    QUICK_GELU_ALPHA,
    SWIGLU,
    ActivationName,
    ExpertsFormula,
    halves_apart,
    halves_interleaved,
)
from crossdock.experts.grouped_mm import grouped_mm
from crossdock.experts.lora import eager_lora, grouped_lora, lora_experts
from crossdock.experts.module import GroupedExperts
from crossdock.experts.operator import EXPERTS_OPS
from crossdock.experts.scaling import load_factors
from crossdock.experts.shared import SharedExperts
from crossdock.experts.triton import triton
from crossdock.experts.unpacked import UnpackedExperts, ranks_apart

__all__ = [
    "ACTIVATIONS",
    "AUTO",
    "EXPERTS_BACKENDS",
    "EXPERTS_OPS",
    "GPT_OSS",
    "QUICK_GELU_ALPHA",
    "SWIGLU",
    "ActivationName",
    "ComputeRows",
    "ExpertAdapters",
    "ExpertClock",
    "ExpertParams",
    "ExpertsBackend",
    "ExpertsFormula",
    "ForeignExperts",
    "GroupedExperts",
    "SharedExperts",
    "UnpackedExperts",
    "autocast_dtype",
    "backend_problem",
    "choose_backend",
    "cpu",
    "eager",
    "eager_lora",
    "grouped_lora",
    "grouped_mm",
    "halves_apart",
    "halves_interleaved",
    "load_factors",
    "lora_experts",
    "pick_backend",
    "ranks_apart",
    "triton",
]
