"""The Mixture-of-Experts layer: decide, place, move, compute, move back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.comm import Pending, run_beside
from crossdock.experts import SWIGLU, ExpertsFormula, GroupedExperts, SharedExperts, UnpackedExperts, autocast_dtype
from crossdock.moe_config import MoEConfig, MoEConfigError
from crossdock.routed_experts import RoutedExperts
from crossdock.routing import (
    BatchTotals,
    LoadCounter,
    LossCoefficients,
    Router,
    RouterConfig,
    Routing,
    StepLoad,
    attach_losses,
    count_experts,
    reduce_load,
    router_losses,
    update_expert_bias,
)

__all__ = [
    "MOE_LAYER_PLACES",
    "MoE",
    "MoELayerPlaces",
    "finish_step",
    "load_counters",
    "moe_layer_places",
    "moe_layers",
    "set_batch_totals",
    "step_load",
]

MOE_LAYER_PLACES = "crossdock_moe_layer_places"
"""The attribute of a model, of which this rank has a part, that says what `moe_layer_places` returns."""


class MoE(RoutedExperts):
    """A Mixture-of-Experts feed-forward layer (docs/design.md, "The spine").

    On one rank as it is; `crossdock.apply_ep` spreads its experts over many. What follows the router's decision is in
    `RoutedExperts`, with its attributes.

    Args:
        hidden_size: `H`.
        intermediate_size: `I`, of each expert; `None` with `experts`.
        router: number of experts, top-k and scoring.
        config: backends, losses, balance.
        experts: modules of your own in place of ours, one per expert, each `[N, H] -> [N, H]`.
        formula: what an expert computes.
        bias: whether the experts' two products have one.
        shared_intermediate_size: of the experts that every token passes, all together; 0 for none.
        shared_gate: whether a learned gate scales their output.

    Attributes:
        batch_totals: size of the global batch that auxiliary losses are a share of (`set_batch_totals`); `None` where
            the micro-batch of this rank is all of it.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None,
        router: RouterConfig,
        config: MoEConfig | None = None,
        *,
        experts: nn.ModuleList | Sequence[nn.Module] | None = None,
        formula: ExpertsFormula = SWIGLU,
        bias: bool = False,
        shared_intermediate_size: int = 0,
        shared_gate: bool = False,
    ) -> None:
        config = config or MoEConfig()
        config.check(router)
        if config.gradient_scale == "output" and formula.weight_on == "input":
            raise ValueError("gradient_scale = 'output' needs experts with the weight on the output, not on the input")
        decides = Router(hidden_size, config.router_config(router))
        if experts is not None:
            computes = _unpacked(experts, intermediate_size, router, config)
        elif intermediate_size is not None:
            computes = GroupedExperts(
                router.num_experts, hidden_size, intermediate_size, config.experts, formula, bias=bias
            )
            computes.static_shapes = config.static_shapes
        else:
            raise ValueError("intermediate_size is None; it must be a number, or experts a list of modules")
        super().__init__(computes, router.num_experts, hidden_size, router.top_k, config, decides)
        self.coefficients = LossCoefficients(
            config.sequence_aux_loss_coeff,
            config.batch_aux_loss_coeff,
            config.global_aux_loss_coeff,
            config.z_loss_coeff,
        )
        self.shared_experts = (
            SharedExperts(hidden_size, shared_intermediate_size, gate=shared_gate, formula=formula)
            if shared_intermediate_size
            else None
        )
        self.batch_totals: BatchTotals | None = None

    # Dynamo would make a graph for every number of tokens that arrive, and cannot follow the exchanges' splits.
    @torch.compiler.disable
    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """`x [..., S, H] -> [..., S, H]`. torch.compile of a model leaves it as it is, whole.

        Args:
            x: this rank's tokens; any number, none included.
            padding_mask: `[..., S]` bool, true where a token is padding: it is routed nowhere and gives 0. `None` takes
                the attribute of that name.
        """
        handed_down, self.padding_mask = self.padding_mask, None
        if padding_mask is None:
            padding_mask = handed_down
        self.begin()
        try:
            tokens, mask, routing, slot_ids = self._route(x, padding_mask)
        except Exception:
            self.refuse()
            raise
        arriving = self.dispatch(tokens, slot_ids, routing.weights)
        shared = None if self.shared_experts is None else self._start_shared(self.shared_experts, tokens)
        output = self.compute(arriving)
        if shared is not None:
            output = output + shared.wait()

        if self.training and torch.is_grad_enabled():
            losses = router_losses(routing, self.coefficients, tuple(x.shape[:-1]), mask, self.batch_totals, self.load)
            output = attach_losses(output, routing, losses, self.coefficients, self.load, mask)
        else:
            self.load.record_evaluation(count_experts(routing.expert_ids, self.num_experts))
        return output.view(x.shape)

    def _start_shared(self, shared_experts: SharedExperts, tokens: Tensor) -> Pending[Tensor]:
        """Shared experts of `tokens`: while they travel, and where the setting says so, while experts compute."""
        if self.config.shared_expert_overlap:
            return run_beside(shared_experts, tokens)
        shared = shared_experts(tokens)
        return Pending(lambda: shared)

    def _route(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Routing, Tensor]:
        """The tokens `[T, H]` of `x`, their padding mask `[T]`, where they go, and the slots there `[T, K]`.

        What can be wrong, raises here.
        """
        self._check(x, padding_mask)
        tokens = x.reshape(-1, self.hidden_size)
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        if mask is not None:
            # A bad number in padding would be one in every gradient: 0 times NaN. Shared experts give 0 for 0.
            tokens = tokens.masked_fill(mask[:, None], 0)
        routing = self.router(tokens, sequence_shape=tuple(x.shape[:-1]), padding_mask=mask)
        if self.config.debug_checks:
            for name, values in (("x", tokens), ("the router's logits", routing.logits)):
                bad = ~values.detach().isfinite().all(dim=1)
                bad = int((bad if mask is None else bad & ~mask).sum())
                if bad:
                    raise ValueError(f"{name} of {bad} of {len(tokens)} tokens: NaN or infinity (debug_checks)")
        return tokens, mask, routing, self.slots_of(routing.expert_ids)

    def _check(self, x: Tensor, padding_mask: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(f"x is a {type(x).__name__}; it must be a tensor [..., S, {self.hidden_size}]")
        if x.dim() == 0:
            raise ValueError(f"x is a scalar; it must be [..., S, {self.hidden_size}]")
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x has {x.shape[-1]} features, this layer's hidden_size is {self.hidden_size}")
        # Router and experts may differ: each may be cast, or not be gathered yet, by FSDP.
        parameters = (self.router.weight, self.example())
        dtypes, devices = ({getattr(p, name) for p in parameters} for name in ("dtype", "device"))
        if x.device not in devices:
            raise ValueError(f"x is on {x.device}, this layer on {_either(devices)}")
        if autocast_dtype(x) not in map(autocast_dtype, parameters):
            raise ValueError(f"x is {x.dtype}, this layer {_either(dtypes)}")
        if padding_mask is None:
            return
        tokens = x.numel() // self.hidden_size
        if padding_mask.numel() != tokens or padding_mask.dtype != torch.bool or padding_mask.device != x.device:
            raise ValueError(
                f"padding_mask must be {list(x.shape[:-1])} torch.bool on {x.device}, not {list(padding_mask.shape)} "
                f"{padding_mask.dtype} on {padding_mask.device}"
            )


def _unpacked(
    experts: nn.ModuleList | Sequence[nn.Module], intermediate_size: int | None, router: RouterConfig, config: MoEConfig
) -> UnpackedExperts:
    """`experts` of a user's own; refuses settings that nothing would look at."""
    if intermediate_size is not None:
        raise ValueError(f"intermediate_size = {intermediate_size}: must be None with experts, which have their own")
    if len(experts) != router.num_experts:
        raise ValueError(f"experts has {len(experts)} modules, the router num_experts = {router.num_experts}")
    for name in ("experts", "static_shapes"):
        if getattr(config, name) != getattr(MoEConfig, name):
            valid = f"must be {getattr(MoEConfig, name)!r} with experts that are modules, which compute themselves"
            raise MoEConfigError(name, getattr(config, name), valid)
    return UnpackedExperts(experts)


def _either(choices: Iterable[object]) -> str:
    return " or ".join(sorted(map(str, choices)))


def moe_layers(model: nn.Module) -> dict[str, RoutedExperts]:
    """The MoE layers of a model by name (as `named_modules` has it, wrappers included), in order.

    Each is a `MoE`, or the `RoutedExperts` of a layer that keeps a router of its own.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}


class MoELayerPlaces(NamedTuple):
    """Where this rank's MoE layers are among those of the whole model, of which other pipeline stages may have some.

    Attributes:
        names: of all layers, in order.
        own: which of them `moe_layers` gives here.
        num_experts: `E` of each; 0 without a layer.
    """

    names: tuple[str, ...]
    own: tuple[int, ...]
    num_experts: int


def moe_layer_places(model: nn.Module) -> MoELayerPlaces:
    """Of a whole model, or one that `crossdock.parallel.apply_pp` has cut."""
    known = getattr(model, MOE_LAYER_PLACES, None)
    if known is not None:
        return known
    layers = moe_layers(model)
    num_experts = max((layer.num_experts for layer in layers.values()), default=0)
    return MoELayerPlaces(tuple(layers), tuple(range(len(layers))), num_experts)


def load_counters(model: nn.Module) -> list[LoadCounter]:
    """Of all MoE layers of the whole model, in order; those of layers that other pipeline stages have are empty."""
    places = moe_layer_places(model)
    device = next(chain(model.buffers(), model.parameters())).device
    own = dict(zip(places.own, (layer.load for layer in moe_layers(model).values()), strict=True))
    return [own.get(index) or LoadCounter(places.num_experts).to(device) for index in range(len(places.names))]


def set_batch_totals(
    model: nn.Module,
    sequences: int,
    tokens: int,
    group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    sum_copies: Callable[[Tensor], None] | None = None,
) -> None:
    """Tell every MoE layer the size of the global batch (all ranks and micro-batches of the step).

    Args:
        sequences: rows of the batch.
        tokens: unpadded tokens, more than 0.
        group: all ranks that hold tokens of the batch, for the auxiliary loss of the `global` level; `None` for this
            rank alone.
        sequence_group: the ranks that share sequences, each with a part of every one; likewise.
        sum_copies: see `BatchTotals`.
    """
    names = [None if each is None else each.group_name for each in (group, sequence_group)]
    totals = BatchTotals(sequences, tokens, *names, sum_copies=sum_copies)
    for layer in moe_layers(model).values():
        if isinstance(layer, MoE):
            layer.batch_totals = totals


def step_load(model: nn.Module, group: dist.ProcessGroup | None = None) -> StepLoad:
    """The first part of `finish_step`, for a caller who adds to the counts: those of the ranks of `group` in the step.

    Raises:
        ValueError: for a model without an MoE layer.
    """
    counters = load_counters(model)
    if not counters:
        raise ValueError("the model has no crossdock.MoE layer, so there is no step to finish")
    return reduce_load(counters, group)


def finish_step(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    update_bias: bool = True,
    load: StepLoad | None = None,
) -> StepLoad:
    """After an optimizer step: sum the step's counts over the ranks, move the expert biases, start counting anew.

    Copies of experts (`crossdock.balance`) are made anew in the next forward pass.

    Args:
        model: its MoE layers all have the same number of experts.
        group: the data-parallel ranks, of all pipeline stages; `None` for this rank alone. Collective.
        update_bias: false leaves the biases as they are, after a step that was skipped.
        load: counts that have been summed already (`step_load`); nothing is collective then.

    Returns:
        Routes per layer and logical expert, and routes that were dropped, over the whole global batch.

    Raises:
        ValueError: for a model without an MoE layer.
    """
    if load is None:
        load = step_load(model, group)
    for layer, index in zip(moe_layers(model).values(), moe_layer_places(model).own, strict=True):
        layer_counts = load.routes[index]
        if update_bias and layer.router is not None:
            update_expert_bias([layer.router], layer_counts[None], layer.config.expert_bias_rate)
        if layer.router is not None:
            layer.router.steps += 1
        layer.load.reset()
        layer.weights_changed()
    return load
