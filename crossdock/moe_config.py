"""Settings of the MoE layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from crossdock.comm import Wire, WireDtype
from crossdock.dispatch import AUTO_DISPATCHER, STATIC_DISPATCHERS, DeepEPOptions, DispatchOptions
from crossdock.routing import RouterConfig

__all__ = ["STATIC_EXPERTS", "MoEConfig", "MoEConfigError"]

STATIC_EXPERTS = ("auto", "grouped_mm", "triton")
"""Values of `experts` that `static_shapes` goes with."""


# What a number must be, and the settings that must be so.
_NUMBERS: Mapping[str, tuple[Callable[[Any], bool], str]]
_NUMBERS = MappingProxyType(
    {
        "0 or more": (
            lambda value: value >= 0,
            "overlap_chunks ranks_per_node deepep_max_tokens_per_rank sequence_aux_loss_coeff batch_aux_loss_coeff "
            "global_aux_loss_coeff z_loss_coeff expert_bias_rate capacity_factor debug_force_zipf_drift",
        ),
        "at least 0 and below 1": (lambda value: 0 <= value < 1, "input_jitter"),
        "0 to 255": (lambda value: 0 <= value < 256, "deepep_dispatch_chunk deepep_combine_chunk"),
        "0, or an even number above": (lambda value: value >= 0 and value % 2 == 0, "deepep_num_sms"),
        "0 or more, or -1": (lambda value: value >= 0 or value == -1, "debug_force_zipf debug_force_zipf_seed"),
    }
)

_ROUTER_SETTINGS = (
    "sequence_aux_loss_coeff batch_aux_loss_coeff global_aux_loss_coeff z_loss_coeff expert_bias expert_bias_rate "
    "capacity_factor drop_policy input_jitter router_dtype router_kernel debug_force_zipf debug_force_zipf_seed "
    "debug_force_zipf_drift"
)


class MoEConfigError(ValueError):
    """A setting that cannot be used: `field`, its `value`, and what would be `valid`."""

    def __init__(self, field: str, value: object, valid: str) -> None:
        super().__init__(field, value, valid)
        self.field, self.value, self.valid = field, value, valid

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.valid}"


@dataclass(frozen=True)
class MoEConfig:
    """Settings of the MoE layers that a user chooses; what a model family fixes is in `RouterConfig`."""

    dispatcher: Literal["auto", "local", "allgather", "alltoall", "hierarchical", "deepep", "symmetric"] = "auto"
    """How tokens travel between expert-parallel ranks: all of them to all ranks (`allgather`), each once to every rank
    that it needs (`alltoall`), or once to every node and on from there (`hierarchical`). `deepep` is as `alltoall`, by
    the library deep_ep on GPUs, `symmetric` by kernels of ours that write into the memory of GPUs on one NVLink.
    `local`: not at all, with one rank. `auto` picks, and says why."""
    overlap_chunks: int = 0
    """Parts of a rank's tokens, one of which travels while experts compute another; 0: picked as `auto` is."""
    ranks_per_node: int = 0
    """Consecutive expert-parallel ranks that make a node, for `hierarchical`, or one NVLink domain, for `symmetric`; 0:
    those launched on one machine."""
    deepep_api: Literal["auto", "elastic", "buffer"] = "auto"
    """Of deep_ep: `ElasticBuffer`, the older `Buffer`, or the first of them that there is."""
    deepep_num_sms: int = 0
    """SMs that an exchange of deep_ep may take, even; 0: its choice."""
    deepep_dispatch_chunk: int = 0
    """Tokens that deep_ep's `Buffer` sends at a time over NVLink, to experts; 0: its choice."""
    deepep_combine_chunk: int = 0
    """Likewise, on their way back."""
    deepep_fp8_dispatch: bool = False
    """Let deep_ep send tokens in FP8; results and gradients stay in bfloat16."""
    deepep_expand: bool = False
    """Let tokens arrive once per route, sorted by expert. Needs `ElasticBuffer`."""
    deepep_max_tokens_per_rank: int = 0
    """Tokens per rank that deep_ep's buffer has room for from the start; it grows where that is too few."""
    wire_dtype: WireDtype = "same"
    """What tokens travel in between ranks: the activations' own dtype (`same`), `bf16`, `fp16`, or `fp8`: e4m3 with a
    scale for every 128 values. A wire that saves nothing is `same`."""
    wire_directions: Literal["tokens", "both"] = "tokens"
    """What `wire_dtype` applies to: tokens in the forward pass alone, or results and gradients as well (`both`)."""
    static_shapes: bool = False
    """Worst-case buffers and no sync of the GPU in a layer: every rank gets room for the tokens of all ranks, as many
    as any had in the first step, and every token for all its experts. With `allgather` or `alltoall`, which are the
    same then, or `symmetric`, which sends no padding; and experts by `grouped_mm` or `triton`."""
    experts: Literal["auto", "cpu", "eager", "grouped_mm", "triton"] = "auto"
    """How experts are computed. `auto`: `cpu` on a CPU, `grouped_mm` on a GPU, and `eager`, a plain loop, where that
    cannot. `triton`: kernels that do everything around the products within them; not yet run on hardware."""
    sequence_aux_loss_coeff: float = 0.0
    """Coefficient of the Switch auxiliary loss per sequence (1 is its value under perfect balance)."""
    batch_aux_loss_coeff: float = 0.0
    """Coefficient of the Switch auxiliary loss per micro-batch. Depends on gradient accumulation by definition."""
    global_aux_loss_coeff: float = 0.0
    """Coefficient of the Switch auxiliary loss of the global batch, whose counts run up over the micro-batches of a
    step. Depends on gradient accumulation by definition."""
    z_loss_coeff: float = 0.0
    """Coefficient of the router's z-loss."""
    expert_bias: bool = False
    """Balance by a bias on the scores' order instead of a loss."""
    expert_bias_rate: float = 1e-3
    """Step of the expert bias after each optimizer step."""
    capacity_factor: float = 0.0
    """Drop routes beyond `ceil(T K / E * capacity_factor)` per expert and rank; 0 drops none. Depends on the layout and
    on gradient accumulation by definition."""
    drop_policy: Literal["probs", "position"] = "probs"
    """Which routes stay: those of the largest weights, or the first in token order."""
    input_jitter: float = 0.0
    """In training, multiply the router's input by uniform noise in `1 +- input_jitter`."""
    router_dtype: Literal["float32", "input"] = "float32"
    """What the router's product is computed in; `input` is the activations' dtype."""
    shared_expert_overlap: bool = False
    """Compute shared experts on a second stream of the GPU, while routed experts compute on the first one. Not yet run
    on hardware; on a CPU it changes nothing."""
    router_kernel: Literal["torch", "triton"] = "torch"
    """What decides from the router's logits: operations of torch, or one kernel that computes scores, experts, weights
    and counts (`triton`). That runs on a GPU, and not with groups of experts, a capacity or forced experts: there
    torch decides. Not yet run on hardware."""
    gradient_scale: Literal["off", "output", "gradient"] = "off"
    """In training, multiply an expert's outputs, or its weights' gradients, by the mean number of routes of the rank's
    experts over its own. Depends on the layout and on gradient accumulation by definition."""
    debug_checks: bool = False
    """Raise for NaN or infinity in a layer's input or in the router's logits, and for experts that there are none of,
    on all expert-parallel ranks. Costs a sync of the GPU in every layer."""
    debug_force_zipf: float = -1.0
    """Draw experts by a Zipf law of this exponent (0: uniform), whatever the router says; -1: off. For experiments."""
    debug_force_zipf_seed: int = -1
    """Shuffles which experts are popular; -1: the lower the index, the more popular."""
    debug_force_zipf_drift: int = 0
    """After so many steps other experts are popular; 0: never."""

    def __post_init__(self) -> None:
        """Raises ValueError that names the field, its value and the valid ones."""
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{name} = {value!r} is unknown; valid: {', '.join(map(str, get_args(hint)))}")
            types = {int: (int,), float: (int, float), bool: (bool,)}.get(hint)
            if types is not None and type(value) not in types:
                raise MoEConfigError(name, value, f"must be of type {hint.__name__}")

    def check(self, family: RouterConfig | None = None) -> None:
        """Look at the settings together.

        Args:
            family: the router that a model's family fixes; it may have a capacity or an expert bias of its own. What
                depends on that is left out where it is not known.

        Raises:
            MoEConfigError: for the first setting that cannot work, or that nothing would look at.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            self._require(field.name, not isinstance(value, float) or math.isfinite(value), "must be a finite number")
        for valid, (holds, names) in _NUMBERS.items():
            for name in names.split():
                self._require(name, holds(getattr(self, name)), f"must be {valid}")
        for field in fields(self):
            usual = getattr(self, field.name) == field.default
            unused = field.name.startswith("deepep_") and self.dispatcher not in ("deepep", AUTO_DISPATCHER)
            valid = f"needs dispatcher = deepep or {AUTO_DISPATCHER}, not {self.dispatcher}"
            self._require(field.name, usual or not unused, valid)
            travels = field.name in ("overlap_chunks", "ranks_per_node", "wire_dtype", "wire_directions")
            valid = "needs a dispatcher other than local, where nothing travels"
            self._require(field.name, usual or not travels or self.dispatcher != "local", valid)
        valid = "needs another dispatcher than deepep; deepep_fp8_dispatch = true sends tokens in fp8"
        self._require("wire_dtype", self.dispatcher != "deepep" or self.wire_dtype == "same", valid)
        valid = "auto or elastic with deepep_expand: Buffer has no expand mode"
        self._require("deepep_api", not self.deepep_expand or self.deepep_api != "buffer", valid)
        for name in ("deepep_dispatch_chunk", "deepep_combine_chunk"):
            buffer = self.deepep_api != "elastic" and not self.deepep_expand
            valid = "needs deepep_api = auto or buffer, without deepep_expand: ElasticBuffer has no chunks"
            self._require(name, not getattr(self, name) or buffer, valid)
        both = self.wire_directions == "both"
        self._require("wire_directions", not both or self.wire_dtype != "same", "needs a wire_dtype other than same")
        seeded = self.debug_force_zipf_seed >= 0
        self._require("debug_force_zipf_seed", not seeded or self.debug_force_zipf >= 0, "needs debug_force_zipf")
        drifts = self.debug_force_zipf_drift > 0
        self._require("debug_force_zipf_drift", not drifts or self.debug_force_zipf >= 0, "needs debug_force_zipf")
        if self.static_shapes:
            for name, valid_names in (
                ("dispatcher", (AUTO_DISPATCHER, "local", *STATIC_DISPATCHERS)),
                ("experts", STATIC_EXPERTS),
            ):
                value = getattr(self, name)
                valid = f"needs {name} = {' or '.join(valid_names)}, not {value}"
                self._require("static_shapes", value in valid_names, valid)
        if family is not None:
            capacity = self.capacity_factor or family.capacity_factor
            drops_as_usual = self.drop_policy == MoEConfig.drop_policy
            self._require("drop_policy", drops_as_usual or bool(capacity), "needs a capacity_factor")
            usual_rate = self.expert_bias_rate == MoEConfig.expert_bias_rate
            has_bias = self.expert_bias or family.expert_bias
            self._require("expert_bias_rate", usual_rate or has_bias, "needs expert_bias = true")

    def check_without_router(self) -> None:
        """Look at the settings of a layer that keeps a router of its own, where nothing would look at those of ours.

        Raises:
            MoEConfigError: for the first of them that is not as usual.
        """
        for name in _ROUTER_SETTINGS.split():
            usual = getattr(MoEConfig, name)
            valid = f"must be {usual!r}: it needs a router of ours, and model.name = generic keeps the family's own"
            self._require(name, getattr(self, name) == usual, valid)

    def _require(self, name: str, holds: bool, valid: str) -> None:
        if not holds:
            raise MoEConfigError(name, getattr(self, name), valid)

    def dispatch_options(self) -> DispatchOptions:
        """How tokens travel."""
        return DispatchOptions(
            ranks_per_node=self.ranks_per_node,
            wire=Wire(self.wire_dtype, both=self.wire_directions == "both"),
            static_shapes=self.static_shapes,
            debug_checks=self.debug_checks,
            deepep=DeepEPOptions(
                self.deepep_api,
                self.deepep_num_sms,
                self.deepep_fp8_dispatch,
                self.deepep_expand,
                self.deepep_max_tokens_per_rank,
                self.deepep_dispatch_chunk,
                self.deepep_combine_chunk,
            ),
        )

    def router_config(self, family: RouterConfig) -> RouterConfig:
        """The router that a model's `family` fixes, with what the user chose.

        A drop policy other than the default counts for the family's own capacity too.
        """
        chosen_policy = self.capacity_factor or self.drop_policy != MoEConfig.drop_policy
        return replace(
            family,
            expert_bias=family.expert_bias or self.expert_bias,
            capacity_factor=self.capacity_factor or family.capacity_factor,
            drop_policy=self.drop_policy if chosen_policy else family.drop_policy,
            input_jitter=self.input_jitter or family.input_jitter,
            router_dtype=family.router_dtype if self.router_dtype == "float32" else self.router_dtype,
            kernel=self.router_kernel,
            force_zipf=family.force_zipf if self.debug_force_zipf < 0 else self.debug_force_zipf,
            force_zipf_seed=family.force_zipf_seed if self.debug_force_zipf_seed < 0 else self.debug_force_zipf_seed,
            force_zipf_drift=self.debug_force_zipf_drift or family.force_zipf_drift,
        )
