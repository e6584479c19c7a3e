"""The part of a Mixture-of-Experts layer behind its router: place, move, compute, move back."""

from __future__ import annotations

from itertools import chain
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.comm import Pending
from crossdock.dispatch import (
    LOCAL_PLAN,
    Dispatched,
    Dispatcher,
    DispatchPlan,
    LocalDispatcher,
    wrong_id,
)
from crossdock.experts import (
    ExpertClock,
    ForeignExperts,
    GroupedExperts,
    UnpackedExperts,
    autocast_dtype,
    load_factors,
)
from crossdock.moe_config import MoEConfig
from crossdock.placement import EMPTY, Placement
from crossdock.routing import LoadCounter, Router, count_experts, count_in_backward, is_recompute

__all__ = ["Relief", "RoutedExperts"]


class Relief(ForeignExperts, Protocol):
    """What keeps the ranks of a layer evenly busy (`crossdock.balance`): experts that more ranks than one compute."""

    def begin(self, experts: GroupedExperts) -> None:
        """First of all in a forward pass, on all ranks of the group that holds the experts."""
        ...

    def slots_of(self, expert_ids: Tensor) -> Tensor:
        """The slot of each route `[T, K]`, `-1` as it is, of `expert_ids [T, K]` that are valid. Collective."""
        ...

    def refuse(self) -> None:
        """Take part in what others do in `slots_of`, where this rank raises before."""
        ...

    def weights_changed(self) -> None:
        """The experts' parameters have new values, on all ranks."""
        ...


class RoutedExperts(nn.Module):
    """The experts of a layer, on one rank or spread over many, for tokens that a router has decided on.

    By itself it takes the place of the experts in a model that keeps a router of its own; `MoE` has ours before it.

    Args:
        experts: of all logical experts.
        num_experts: `E`.
        hidden_size: `H`.
        top_k: `K`.
        config: backends, dispatcher; settings of a router are not looked at here.
        router: ours, which `MoE` calls.

    Attributes:
        experts: `GroupedExperts`, or `UnpackedExperts` for modules of a user's own.
        router: `Router`; `None` where the model has its own.
        placement: which slot on which rank holds which logical expert.
        dispatcher: moves tokens.
        dispatch_plan: how, and why so.
        ep_group, ep_rank, ep_world_size: the ranks that together hold all experts.
        is_first_replica: whether this rank is of the first of the groups that hold the same shards.
        sums_replicas: false where such groups differ in their gradients until something sums them (`GradientManager`).
        load: counts of tokens per logical expert.
        clock: how long experts take in the forward passes of training.
        relief: which copies of experts tokens go to, and who helps out; `None` for one slot per expert.
        padding_mask: `[..., S]`, of the next forward pass alone, where the model hands the layer only tokens. With
            activation checkpointing, set it inside of what is run again.
    """

    router: Any
    experts: Any
    _expert_to_slot: Tensor

    def __init__(
        self,
        experts: GroupedExperts | UnpackedExperts,
        num_experts: int,
        hidden_size: int,
        top_k: int,
        config: MoEConfig,
        router: Router | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.router = router
        self.num_experts, self.hidden_size, self.top_k = num_experts, hidden_size, top_k
        self.experts = experts
        self.load = LoadCounter(num_experts)
        self.padding_mask: Tensor | None = None
        self.relief: Relief | None = None
        self.clock = ExpertClock()
        self.register_buffer("_expert_to_slot", torch.arange(num_experts), persistent=False)
        dispatcher = LocalDispatcher(num_experts, debug_checks=config.debug_checks)
        self.place(Placement.contiguous(num_experts, 1), dispatcher, None)

    def place(
        self,
        placement: Placement,
        dispatcher: Dispatcher,
        ep_group: dist.ProcessGroup | None,
        plan: DispatchPlan = LOCAL_PLAN,
    ) -> None:
        """Set where experts live and how tokens get there. The caller has laid out the experts' parameters to match."""
        self.dispatcher, self.dispatch_plan = dispatcher, plan
        self.ep_group = ep_group
        self.ep_rank = dist.get_rank(ep_group) if ep_group is not None else 0
        self.ep_world_size = placement.num_ranks
        self.is_first_replica = ep_group is None or 0 in dist.get_process_group_ranks(ep_group)
        self.sums_replicas = True
        if isinstance(self.experts, GroupedExperts):
            self.experts.is_whole = self.ep_world_size == 1
        self.replace(placement, None)

    def reconfigure(self, config: MoEConfig) -> None:
        """Take other settings of how tokens travel and experts compute; before `apply_ep`, which builds by them."""
        self.config = config
        if isinstance(self.experts, GroupedExperts):
            self.experts.backend, self.experts.static_shapes = config.experts, config.static_shapes

    def replace(self, placement: Placement, relief: Relief | None) -> None:
        """Put another placement in force, of as many slots as the dispatcher knows, between steps and on all ranks."""
        self.placement, self.relief = placement, relief
        self._write_placement()

    def _write_placement(self) -> None:
        """Write the placement's map of logical experts to slots to the device."""
        slots = torch.tensor(self.placement.expert_to_slot)
        if not self._expert_to_slot.is_meta:
            self._expert_to_slot.copy_(slots)

    def reset_buffers(self) -> None:
        """Give all buffers their first values: needed after `to_empty`, which leaves them uninitialised."""
        self._write_placement()
        self.load.reset()
        self.load.reset_evaluation()
        self.weights_changed()
        if self.router is not None and self.router.expert_bias is not None:
            self.router.expert_bias.zero_()

    def weights_changed(self) -> None:
        """Say that the experts' parameters have new values, on all ranks that hold them: copies are made anew."""
        if self.relief is not None:
            self.relief.weights_changed()

    def begin(self) -> None:
        """First of all in a forward pass, before anything that may raise."""
        if self.relief is not None:
            self.relief.begin(self.experts)

    def refuse(self) -> None:
        """Where a forward pass raises before `dispatch`: tell the other ranks, which wait for this one."""
        if self.relief is not None:
            self.relief.refuse()
        self.dispatcher.refuse(self._expert_to_slot.device)

    def example(self) -> nn.Parameter:
        """A parameter with the dtype and device of the experts, or of the router where this rank has none."""
        return next(chain(self.experts.parameters(), self.parameters()))

    @property
    def local_expert_ids(self) -> tuple[int, ...]:
        """The logical expert of each of this rank's rows of parameters, `-1` for an empty one."""
        return self.placement.experts_on(self.ep_rank)

    @torch.compiler.disable
    def forward(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """The weighted sum over each token's experts; the arguments are those of transformers' experts modules.

        Args:
            tokens: `[T, H]`, this rank's; any number, none included.
            expert_ids: `[T, K]` logical experts; `E` or more, or `-1`, is no route.
            weights: `[T, K]` in any floating dtype; taken in fp32 (float64 stays).

        Returns:
            `[T, H]` in the dtype of `tokens`.
        """
        mask, self.padding_mask = self.padding_mask, None
        self.begin()
        try:
            mask = self._check_routes(tokens, expert_ids, weights, mask)
            expert_ids = expert_ids.masked_fill(expert_ids >= self.num_experts, -1)
            if mask is not None:
                expert_ids = expert_ids.masked_fill(mask[:, None], -1)
            weights = weights.to(torch.promote_types(tokens.dtype, torch.float32)).masked_fill(expert_ids < 0, 0)
            slot_ids = self.slots_of(expert_ids)
        except Exception:
            self.refuse()
            raise
        output = self.compute(self.dispatch(tokens, slot_ids, weights)).to(tokens.dtype)
        if self.training and torch.is_grad_enabled():
            return count_in_backward(output, expert_ids, self.num_experts, self.load, mask)
        self.load.record_evaluation(count_experts(expert_ids, self.num_experts))
        return output

    def _check_routes(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor | None:
        """Refuse arguments that do not go together; the padding mask as `[T]`."""
        if tokens.dim() != 2 or tokens.shape[1] != self.hidden_size:
            raise ValueError(f"tokens are {list(tokens.shape)}; they must be [T, {self.hidden_size}]")
        if expert_ids.shape != weights.shape or len(expert_ids) != len(tokens) or expert_ids.dim() != 2:
            raise ValueError(
                f"expert_ids {list(expert_ids.shape)} and weights {list(weights.shape)} must both be "
                f"[{len(tokens)}, {self.top_k}]"
            )
        if mask is None:
            return None
        if mask.numel() != len(tokens):
            raise ValueError(f"padding_mask {list(mask.shape)} must be of {len(tokens)} tokens")
        return mask.reshape(-1)

    def slots_of(self, expert_ids: Tensor) -> Tensor:
        """Logical experts to global slots, `[T, K]`; `-1` stays. Refuses experts that there are none of, on a CPU."""
        if self.config.debug_checks:
            self._check_experts(expert_ids)
        try:
            slot_ids = torch.where(expert_ids < 0, expert_ids, self._expert_to_slot[expert_ids])
        except IndexError:  # on a CPU
            self._check_experts(expert_ids)
            raise
        return slot_ids if self.relief is None else self.relief.slots_of(expert_ids)

    def _check_experts(self, expert_ids: Tensor) -> None:
        if (wrong := wrong_id(expert_ids, self.num_experts)) is not None:
            raise ValueError(f"the router chose expert {wrong}; valid are 0 to {self.num_experts - 1}, or -1 for none")

    def dispatch(self, tokens: Tensor, slot_ids: Tensor, weights: Tensor) -> list[Pending[Dispatched]]:
        """Send tokens `[T, H]`, slots and weights `[T, K]` off, in chunks of about as many tokens."""
        # Experts would cast them: in that dtype half as many bytes travel.
        of_tokens = (tokens.to(autocast_dtype(tokens)), slot_ids, weights)
        chunks = self.dispatch_plan.overlap_chunks
        if chunks == 1:
            return [self.dispatcher.dispatch(*of_tokens)]
        parts = zip(*(tensor.tensor_split(chunks) for tensor in of_tokens), strict=True)
        return [self.dispatcher.dispatch(*part) for part in parts]

    def compute(self, arriving: list[Pending[Dispatched]]) -> Tensor:
        """The experts' sums `[T, H]`: of one chunk while later ones arrive and earlier ones return."""
        scale = self.config.gradient_scale if self.training else "off"
        factors = None
        if scale == "off":
            arrived = (pending.wait() for pending in arriving)
        else:
            arrived = [pending.wait() for pending in arriving]  # they are counted together
            factors = self._load_factors(arrived)
        returning = []
        for chunk in arrived:
            weights = (
                chunk.weights * factors[chunk.slot_ids] if factors is not None and scale == "output" else chunk.weights
            )
            y = self._compute_chunk(chunk, weights, factors if scale == "gradient" else None)
            returning.append(self.dispatcher.combine(y, chunk.handle))
        outputs = [pending.wait() for pending in returning]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _compute_chunk(self, chunk: Dispatched, weights: Tensor, factors: Tensor | None) -> Tensor:
        relief = () if self.relief is None else (self.relief,)
        if not self.training or not torch.is_grad_enabled() or is_recompute():
            return self.experts(chunk.tokens, chunk.slot_ids, weights, factors, *relief)
        self.load.record_computed(chunk.slot_ids)
        with self.clock.running(chunk.tokens.device):
            return self.experts(chunk.tokens, chunk.slot_ids, weights, factors, *relief)

    def _load_factors(self, arrived: list[Dispatched]) -> Tensor:
        """What `gradient_scale` multiplies by, of each slot `[P/R]`."""
        num_experts = sum(expert != EMPTY for expert in self.local_expert_ids)
        slot_ids = torch.cat([chunk.slot_ids.flatten() for chunk in arrived])
        return load_factors(slot_ids, len(self.local_expert_ids), num_experts, arrived[0].weights.dtype)

    def extra_repr(self) -> str:
        return f"ep_rank={self.ep_rank}, ep_world_size={self.ep_world_size}, slots={self.placement.slots_per_rank}"
