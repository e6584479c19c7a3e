"""Settings of `[balance]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BalanceConfig", "BalanceStrategy"]

BalanceStrategy = Literal["none", "eplb", "spill", "eplb+spill", "auto"]
"""What keeps ranks evenly busy: experts placed and copied between steps, experts borrowed within a step, both."""


@dataclass(frozen=True)
class BalanceConfig:
    """`[balance]`: how the ranks that hold a layer's experts are kept evenly busy (docs/balance.md)."""

    strategy: BalanceStrategy = "none"
    """`eplb`: experts move between ranks, and busy ones get copies, as their loads ask for. `spill`: in every step,
    idle ranks compute for overloaded ones. `auto` decides by the ranks, their links and the skew, and says why."""
    num_redundant_experts: int = -1
    """Copies of experts in a layer, all ranks together: a multiple of expert_parallel_degree. -1: one per rank with
    `eplb`, none without."""
    copy_choice: Literal["even", "nearest", "least_load"] = "even"
    """Which copy of an expert a token takes: each in turn; one on its own rank or node, if there is one; or so that the
    ranks are level in this very step, for which they exchange counts."""
    planner: Literal["exchange", "deepseek"] = "exchange"
    """Where experts and copies go: ours, or DeepSeek's published method."""
    rebalance_interval: int = 100
    """Steps between looks at the placement; 0: only rebalance_threshold counts."""
    rebalance_threshold: float = 0.0
    """Look at once when the busiest rank has had more than this times the mean for rebalance_patience steps; 0: never.
    """
    rebalance_patience: int = 10
    """Steps in a row above rebalance_threshold."""
    load_decay: float = 0.9
    """Of the moving average of loads, per step, that placements are planned by."""
    min_gain: float = 0.02
    """Leave a layer as it is where max/mean over ranks would fall by less."""
    move_cost: float = 0.05
    """What moving all experts of a layer would have to gain, in max/mean; part of them in proportion."""
    move_if_it_pays: bool = True
    """Leave experts where they are unless the time that the move takes is won back before the next look."""
    memory_bound: bool = False
    """With `spill`: no rank ever computes more than (1 + spill_slack) times the mean of the routes, at any price."""
    spill_slack: float = 0.02
    """How far above the mean of a step's routes a rank may stay."""
    max_borrowed: int = 0
    """Experts that a rank may borrow in a layer at a time; 0: as many as any load can ask for."""
    min_spilled_routes: int = 16
    """Fewer routes of an expert than that are not worth borrowing it, unless memory_bound asks for it."""
    spill_if_it_pays: bool = True
    """Spill only where the measured speed of links and of this device's products says that it saves time."""

    @property
    def moves(self) -> bool:
        """Whether experts may move and have copies."""
        return self.strategy in ("eplb", "eplb+spill", "auto")

    @property
    def spills(self) -> bool:
        """Whether ranks may help others out within a step."""
        return self.strategy in ("spill", "eplb+spill", "auto")
