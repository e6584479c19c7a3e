"""What is swept: the settings that are open, and the values that each could have here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from crossdock.comm import Wire, WireDtype
from crossdock.config.tuned import AUTOMATIC, KERNEL_TILES, THREADS, tile_setting
from crossdock.dispatch import choose_deepep_api, load_deepep
from crossdock.experts import EXPERTS_BACKENDS, ExpertParams, backend_problem, pick_backend
from crossdock.kernels import KERNELS, bucket_of, candidates
from crossdock.moe_config import STATIC_EXPERTS, MoEConfig
from crossdock.routed_experts import RoutedExperts

__all__ = ["Dimension", "dimensions", "kernel_tiles"]

_CHUNKS = (1, 2, 4)
# Of 132 on an H100 or H200; DeepEP's own choices lie between.
_DEEPEP_SMS = (8, 12, 16, 20, 24, 32, 48)
# As in the library's own tests of its `Buffer`, which is for so many ranks within one NVLink domain.
_DISPATCH_CHUNKS, _COMBINE_CHUNKS = (4, 6, 8, 12, 16, 24, 32), (1, 2, 3, 4, 5, 6)
_NVLINK_RANKS = 8


@dataclass(frozen=True)
class Dimension:
    """One setting and its candidates.

    Attributes:
        name: of the setting, as in `TunedEntry.settings`.
        candidates: values, that of the default first; none where it is skipped.
        skipped: why it is not swept here; empty where it is.
        lossy: whether other values than the default change what is computed, not how.
        part: what is timed: the whole layer, or its experts alone.
        given: values of other settings, without which this one has no part in anything.
    """

    name: str
    candidates: tuple[Any, ...] = ()
    skipped: str = ""
    lossy: bool = False
    part: Literal["layer", "experts"] = "layer"
    given: Mapping[str, Any] = field(default_factory=dict)


def dimensions(
    layer: RoutedExperts,
    config: MoEConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens_per_rank: int,
    ranks_per_machine: int,
    threads: int,
    own_threads: bool,
) -> list[Dimension]:
    """All of them, in the order in which they are swept: each is measured with what was chosen before it.

    Args:
        layer: spread over its ranks, on `device`.
        config: the user's; what it sets is not swept.
        dtype: of activations.
        device: of this rank.
        tokens_per_rank: `T`.
        ranks_per_machine: that share its cores.
        threads: of this rank at present.
        own_threads: whether the number of threads was left open.
    """
    swept = [
        _threads(device, threads, own_threads, ranks_per_machine),
        *_kernel_tiles(layer, config, dtype, device, tokens_per_rank),
        _experts(layer, dtype, device),
        _overlap_chunks(layer),
        *_deepep(layer, device),
        _wire_dtype(layer, dtype),
    ]
    return [_unless_set(each, config) for each in swept]


def _unless_set(dimension: Dimension, config: MoEConfig) -> Dimension:
    name = dimension.name
    if name not in AUTOMATIC or getattr(config, name) == AUTOMATIC[name]:
        return dimension
    return Dimension(name, skipped=f"moe.{name} = {getattr(config, name)} is set", lossy=dimension.lossy)


def _dimension(name: str, default: Any, others: Iterable[Any], alone: str, *, lossy: bool = False) -> Dimension:
    candidates = tuple(dict.fromkeys((default, *others)))
    if len(candidates) == 1:
        return Dimension(name, skipped=alone, lossy=lossy)
    return Dimension(name, candidates, lossy=lossy)


def _threads(device: torch.device, threads: int, own_threads: bool, ranks_per_machine: int) -> Dimension:
    if device.type != "cpu":
        return Dimension(THREADS, skipped="for CPUs alone")
    if not own_threads:
        return Dimension(THREADS, skipped="OMP_NUM_THREADS is set")
    # More threads than cores wait for one another, ten times as long.
    most = (os.cpu_count() or 1) // ranks_per_machine
    others = (each for each in (1, threads // 2, 2 * threads) if 1 <= each <= most)
    return _dimension(THREADS, threads, others, f"{ranks_per_machine} ranks share {os.cpu_count()} cores")


def _kernel_tiles(
    layer: RoutedExperts, config: MoEConfig, dtype: torch.dtype, device: torch.device, tokens_per_rank: int
) -> list[Dimension]:
    """One for each of the kernels of backend `triton`."""
    if device.type == "cpu":
        return [Dimension(KERNEL_TILES, skipped="for GPUs alone")]
    if config.experts not in ("auto", "triton"):
        return [Dimension(KERNEL_TILES, skipped=f"moe.experts = {config.experts} is set")]
    if problem := backend_problem("triton", *_computed(layer, dtype, device)):
        return [Dimension(KERNEL_TILES, skipped=f"experts backend triton {problem}")]
    if dtype.itemsize != 2:
        return [Dimension(KERNEL_TILES, skipped=f"for bfloat16 and float16, not {dtype}")]
    return kernel_tiles(layer, tokens_per_rank)


def kernel_tiles(layer: RoutedExperts, tokens_per_rank: int) -> list[Dimension]:
    """Tiles of each kernel, for the buckets that the average rows of a slot may fall into."""
    ranks = layer.ep_world_size
    tokens = tokens_per_rank * ranks / layer.dispatch_plan.overlap_chunks
    routes = tokens * layer.top_k * (ranks if layer.config.static_shapes else 1)
    rows_per_slot = routes / (layer.placement.slots_per_rank * ranks)
    # Routing varies: beside a boundary, either bucket may be the one of a step.
    buckets = tuple(dict.fromkeys(bucket_of(rows_per_slot * factor) for factor in (0.8, 1.0, 1.25)))
    return [
        Dimension(tile_setting(kernel, buckets), values, part="experts", given={"experts": "triton"})
        for kernel in KERNELS
        if len(values := candidates(kernel, rows_per_slot)) > 1
    ]


def _computed(layer: RoutedExperts, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ExpertParams]:
    """What a backend is asked about."""
    rows = layer.experts.local_rows()
    params = ExpertParams(*(rows.get(name) for name in ExpertParams._fields))  # type: ignore[arg-type]
    return torch.empty(0, layer.hidden_size, dtype=dtype, device=device), params


def _experts(layer: RoutedExperts, dtype: torch.dtype, device: torch.device) -> Dimension:
    tokens, params = _computed(layer, dtype, device)
    static = layer.config.static_shapes
    picked = "grouped_mm" if static else pick_backend(tokens, params)
    # `eager` is the reference: no one's fastest, at six times the memory.
    names = [name for name in EXPERTS_BACKENDS if name != "eager" and (not static or name in STATIC_EXPERTS)]
    if device.type == "cpu":  # Triton's interpreter is for tests.
        names.remove("triton")
    others = [name for name in names if not backend_problem(name, tokens, params)]
    return _dimension("experts", picked, others, f"no other backend than {picked} computes this")


def _overlap_chunks(layer: RoutedExperts) -> Dimension:
    if layer.ep_world_size == 1:
        return Dimension("overlap_chunks", skipped="nothing travels: one rank holds all experts")
    picked = layer.dispatch_plan.overlap_chunks
    return _dimension("overlap_chunks", picked, _CHUNKS, "")


def _deepep(layer: RoutedExperts, device: torch.device) -> list[Dimension]:
    """What the library leaves open; of its `Buffer` alone, chunks."""
    names = ("deepep_num_sms", "deepep_dispatch_chunk", "deepep_combine_chunk")
    try:
        library = load_deepep()
    except ValueError as error:
        missing = isinstance(error.__cause__, ImportError)
        return [Dimension(name, skipped="deep_ep is not installed" if missing else str(error)) for name in names]
    if (dispatcher := layer.dispatch_plan.dispatcher) != "deepep":
        return [Dimension(name, skipped=f"tokens travel by {dispatcher}") for name in names]
    sms, dispatch_chunk, combine_chunk = names
    most = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else max(_DEEPEP_SMS)
    swept = [_dimension(sms, 0, (each for each in _DEEPEP_SMS if each <= most), "")]
    if not choose_deepep_api(library, layer.config.dispatch_options().deepep).takes_chunks:
        why = "ElasticBuffer has no chunks"
    elif layer.ep_world_size > _NVLINK_RANKS:
        why = f"for {_NVLINK_RANKS} expert-parallel ranks at most"
    else:
        chunks = [(dispatch_chunk, _DISPATCH_CHUNKS), (combine_chunk, _COMBINE_CHUNKS)]
        return [*swept, *(_dimension(name, 0, sizes, "") for name, sizes in chunks)]
    return [*swept, Dimension(dispatch_chunk, skipped=why), Dimension(combine_chunk, skipped=why)]


def _wire_dtype(layer: RoutedExperts, dtype: torch.dtype) -> Dimension:
    name = "wire_dtype"
    if layer.ep_world_size == 1:
        return Dimension(name, skipped="nothing travels: one rank holds all experts", lossy=True)
    if layer.dispatch_plan.dispatcher == "deepep":
        return Dimension(name, skipped="deepep has none; its own is moe.deepep_fp8_dispatch", lossy=True)
    narrower = [each for each in get_args(WireDtype) if not Wire(each).leaves(layer.hidden_size, dtype)]
    return _dimension(name, "same", narrower, f"none is narrower than {dtype}", lossy=True)
