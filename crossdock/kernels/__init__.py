"""Triton kernels, each beside its plain-torch reference, which runs where Triton or a GPU is missing."""

from crossdock.kernels.activations import (
    FusedActivation,
    fused_quick_geglu_prob,
    fused_silu_gate_prob,
    get_fused_activation_fn,
    quick_geglu_prob_reference,
    silu_gate_prob_reference,
)
from crossdock.kernels.gating import Gating
from crossdock.kernels.permute import permute, permute_reference, unpermute, unpermute_reference
from crossdock.kernels.quantize import FP8_GROUP, dequantize_fp8, quantize_fp8, quantize_fp8_reference
from crossdock.kernels.routing import Decision, Scoring, decide, decide_reference
from crossdock.kernels.sort import (
    RouteOrder,
    counting_sort,
    counting_sort_reference,
    invert_order,
    invert_order_reference,
)
from crossdock.kernels.tiles import KERNELS, ROW_BUCKETS, Tiles, TileTable, bucket_of, candidates, default_tiles

__all__ = [
    "FP8_GROUP",
    "KERNELS",
    "ROW_BUCKETS",
    "Decision",
    "FusedActivation",
    "Gating",
    "RouteOrder",
    "Scoring",
    "TileTable",
    "Tiles",
    "bucket_of",
    "candidates",
    "counting_sort",
    "counting_sort_reference",
    "decide",
    "decide_reference",
    "default_tiles",
    "dequantize_fp8",
    "fused_quick_geglu_prob",
    "fused_silu_gate_prob",
    "get_fused_activation_fn",
    "invert_order",
    "invert_order_reference",
    "permute",
    "permute_reference",
    "quantize_fp8",
    "quantize_fp8_reference",
    "quick_geglu_prob_reference",
    "silu_gate_prob_reference",
    "unpermute",
    "unpermute_reference",
]
