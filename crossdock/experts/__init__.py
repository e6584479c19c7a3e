"""Experts: their parameters and the backends that compute with them."""

from collections.abc import Mapping
from types import MappingProxyType

from crossdock.experts.eager import eager
from crossdock.experts.experts import ExpertParams, ExpertsBackend, GroupedExperts, swiglu
from crossdock.experts.grouped_mm import grouped_mm, grouped_mm_problem

__all__ = [
    "EXPERTS_BACKENDS",
    "ExpertParams",
    "ExpertsBackend",
    "GroupedExperts",
    "eager",
    "grouped_mm",
    "grouped_mm_problem",
    "swiglu",
]

EXPERTS_BACKENDS: Mapping[str, ExpertsBackend] = MappingProxyType({"eager": eager, "grouped_mm": grouped_mm})
