"""What `[balance]` needs of a model and its layout."""

from __future__ import annotations

from collections.abc import Sequence

from crossdock.balance.config import BalanceConfig
from crossdock.balance.spilling import borrowed_slots_needed
from crossdock.experts import UnpackedExperts
from crossdock.moe_config import MoEConfig
from crossdock.routed_experts import RoutedExperts

__all__ = ["BalanceError", "borrowed_slots", "check_balance", "check_sizes", "copies_per_rank"]


class BalanceError(ValueError):
    """A setting of `[balance]` that does not go with a model or its layout: `field`, its `value`, what is `valid`."""

    def __init__(self, field: str, value: object, valid: str) -> None:
        super().__init__(field, value, valid)
        self.field, self.value, self.valid = field, value, valid

    def __str__(self) -> str:
        return f"balance.{self.field} = {self.value!r}: {self.valid}"


def copies_per_rank(config: BalanceConfig, num_ranks: int) -> int:
    """Copies that a rank holds in a layer. Raises BalanceError where they do not divide over the ranks."""
    redundant = config.num_redundant_experts
    if not config.moves or not redundant:
        return 0
    if redundant == -1:
        return 1
    if redundant % num_ranks:
        near = max(1, round(redundant / num_ranks)) * num_ranks
        valid = f"must be a multiple of expert_parallel_degree = {num_ranks}; the nearest is {near}"
        raise BalanceError("num_redundant_experts", redundant, valid)
    return redundant // num_ranks


def borrowed_slots(config: BalanceConfig, slots_per_rank: int, num_ranks: int) -> int:
    """Slots for experts that a rank borrows. Raises BalanceError where they are too few for the memory bound."""
    needed = borrowed_slots_needed(slots_per_rank, num_ranks)
    if not config.max_borrowed:
        return needed
    if config.memory_bound and config.max_borrowed < needed:
        valid = f"must be 0, or at least {needed} with balance.memory_bound, so that any load can be kept below it"
        raise BalanceError("max_borrowed", config.max_borrowed, valid)
    return min(config.max_borrowed, needed)


def check_sizes(config: BalanceConfig, moe: MoEConfig, num_experts: int, num_ranks: int) -> None:
    """Look at settings together, before there is a model.

    Args:
        config: of `[balance]`.
        moe: of the layers.
        num_experts: `E`.
        num_ranks: expert-parallel ranks.

    Raises:
        BalanceError: for the first setting that cannot work, or that nothing would look at.
    """
    usual = BalanceConfig()
    for name, holds, valid in (
        ("num_redundant_experts", config.num_redundant_experts >= -1, "0 or more, or -1"),
        ("rebalance_interval", config.rebalance_interval >= 0, "0 or more"),
        ("rebalance_threshold", config.rebalance_threshold == 0 or config.rebalance_threshold > 1, "0, or above 1"),
        ("rebalance_patience", config.rebalance_patience >= 1, "1 or more"),
        ("load_decay", 0 <= config.load_decay < 1, "at least 0 and below 1"),
        ("min_gain", config.min_gain >= 0, "0 or more"),
        ("move_cost", config.move_cost >= 0, "0 or more"),
        ("spill_slack", config.spill_slack >= 0, "0 or more"),
        ("max_borrowed", config.max_borrowed >= 0, "0 or more"),
        ("min_spilled_routes", config.min_spilled_routes >= 0, "0 or more"),
    ):
        if not holds:
            raise BalanceError(name, getattr(config, name), f"must be {valid}")
    for names, used, valid in (
        (_OF_MOVES, config.moves, "needs balance.strategy = eplb, eplb+spill or auto"),
        (_OF_SPILLS, config.spills, "needs balance.strategy = spill, eplb+spill or auto"),
    ):
        for name in names:
            value = getattr(config, name)
            if value != getattr(usual, name) and not used:
                raise BalanceError(name, value, valid)
    looks = config.rebalance_interval or config.rebalance_threshold or not config.moves
    for name, holds, valid in (
        (
            "rebalance_interval",
            looks,
            "must be above 0, or balance.rebalance_threshold be set: nothing would ever move",
        ),
        (
            "rebalance_patience",
            config.rebalance_threshold or config.rebalance_patience == usual.rebalance_patience,
            "needs balance.rebalance_threshold",
        ),
        (
            "copy_choice",
            config.num_redundant_experts or config.copy_choice == usual.copy_choice,
            f"must be {usual.copy_choice} with balance.num_redundant_experts = 0: there are no copies to choose among",
        ),
    ):
        if not holds:
            raise BalanceError(name, getattr(config, name), valid)
    if config.strategy == "none" or num_ranks == 1:
        return
    if moe.gradient_scale != "off":
        valid = f"must be none with moe.gradient_scale = {moe.gradient_scale}, which looks at ranks' own experts"
        raise BalanceError("strategy", config.strategy, valid)
    if moe.static_shapes and config.spills:
        valid = "must be none or eplb with moe.static_shapes: ranks exchange counts to help each other out"
        raise BalanceError("strategy", config.strategy, valid)
    if moe.static_shapes and config.copy_choice == "least_load":
        valid = "must be even or nearest with moe.static_shapes: ranks exchange counts for it"
        raise BalanceError("copy_choice", config.copy_choice, valid)
    copies = copies_per_rank(config, num_ranks)
    rows = -(-num_experts // num_ranks)
    if copies + rows > num_experts:
        valid = f"must be at most {(num_experts - rows) * num_ranks}: a rank holds no expert twice"
        raise BalanceError("num_redundant_experts", config.num_redundant_experts, valid)
    if config.spills:
        borrowed_slots(config, rows + copies, num_ranks)


_OF_MOVES = (
    "num_redundant_experts",
    "copy_choice",
    "planner",
    "rebalance_interval",
    "rebalance_threshold",
    "rebalance_patience",
    "load_decay",
    "min_gain",
    "move_cost",
    "move_if_it_pays",
)
_OF_SPILLS = ("memory_bound", "spill_slack", "max_borrowed", "min_spilled_routes", "spill_if_it_pays")


def check_balance(config: BalanceConfig, layers: Sequence[RoutedExperts]) -> None:
    """Look at the layers of a model, spread over ranks.

    Raises:
        BalanceError: where they cannot be balanced.
    """
    for layer in layers:
        check_sizes(config, layer.config, layer.num_experts, layer.ep_world_size)
        if isinstance(layer.experts, UnpackedExperts):
            valid = "must be none: the experts of this model are modules, which cannot be copied"
            raise BalanceError("strategy", config.strategy, valid)
