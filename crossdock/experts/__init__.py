"""Experts: their parameters and the backends that compute with them."""

from crossdock.experts.autocast import autocast_dtype
from crossdock.experts.choice import AUTO, EXPERTS_BACKENDS, choose_backend
from crossdock.experts.cpu import cpu
from crossdock.experts.eager import eager
from crossdock.experts.experts import ExpertParams, ExpertsBackend
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
from crossdock.experts.module import GroupedExperts
from crossdock.experts.operator import EXPERTS_OPS
from crossdock.experts.scaling import load_factors
from crossdock.experts.shared import SharedExperts

__all__ = [
    "ACTIVATIONS",
    "AUTO",
    "EXPERTS_BACKENDS",
    "EXPERTS_OPS",
    "GPT_OSS",
    "QUICK_GELU_ALPHA",
    "SWIGLU",
    "ActivationName",
    "ExpertParams",
    "ExpertsBackend",
    "ExpertsFormula",
    "GroupedExperts",
    "SharedExperts",
    "autocast_dtype",
    "choose_backend",
    "cpu",
    "eager",
    "grouped_mm",
    "halves_apart",
    "halves_interleaved",
    "load_factors",
]
