"""When placements are looked at again, and what `strategy = auto` does."""

from __future__ import annotations

from typing import Any

from crossdock.balance.config import BalanceConfig

__all__ = ["Deciding"]

# Steps that `auto` watches before it decides; and what it takes for even, in max/mean over ranks.
_WATCHED_STEPS = 10
_EVEN = 1.1


class Deciding:
    """The policy of `[balance]`; the same on all ranks, which all see the same loads.

    Args:
        config: of the run.
        num_nodes: that the ranks which hold the experts lie on.

    Attributes:
        moves: experts move and have copies.
        spills: ranks help others out within a step.
    """

    def __init__(self, config: BalanceConfig, num_nodes: int) -> None:
        self.config, self.num_nodes = config, num_nodes
        decides = config.strategy == "auto"
        # A bound on memory is kept from the first step on, whatever else is decided.
        self.moves, self.spills = config.moves and not decides, config.spills and (config.memory_bound or not decides)
        self._decides = decides
        self._steps = self._above = 0
        self._due = False
        self._watched: list[tuple[float, float]] = []

    def update(self, before: float, after: float) -> list[str]:
        """Take in a step's max/mean over ranks, before and after relief; says what `auto` has decided by it."""
        self._steps += 1
        threshold = self.config.rebalance_threshold
        self._above = self._above + 1 if threshold and after > threshold else 0
        if not self._decides:
            return []
        self._watched.append((before, after))
        if len(self._watched) < _WATCHED_STEPS:
            return []
        before, after = (sum(values) / _WATCHED_STEPS for values in zip(*self._watched, strict=True))
        self._watched.clear()
        return self._decide(before, after)

    def is_due(self) -> bool:
        """Whether placements are to be looked at after this step."""
        if not self.moves:
            return False
        interval = self.config.rebalance_interval
        overdue = interval > 0 and self._steps >= interval
        return self._due or overdue or self._above >= self.config.rebalance_patience

    def looked(self) -> None:
        """Placements have been looked at."""
        self._steps = self._above = 0
        if self._due:
            self._watched.clear()
        self._due = False

    def state(self) -> dict[str, Any]:
        """Where the policy stands, for `restore`. Plain values."""
        return {
            "moves": self.moves,
            "spills": self.spills,
            "decides": self._decides,
            "steps": self._steps,
            "above": self._above,
            "due": self._due,
            "watched": [list(pair) for pair in self._watched],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what `state` gave; or, where ranks or slots are others now, with what `auto` had decided of it."""
        if self.config.strategy == "auto":
            self.moves = state["moves"]
            self.spills = self.spills or (state["spills"] and self.num_nodes == 1)
        if "steps" in state:
            self._decides = self._decides and state["decides"]
            self._steps, self._above, self._due = state["steps"], state["above"], state["due"]
            self._watched = [(before, after) for before, after in state["watched"]]

    def _decide(self, before: float, after: float) -> list[str]:
        """By the means of some steps."""
        if not self.moves:
            if before < _EVEN:
                return []
            self.moves = self._due = True
            return [f"balance auto: experts are placed by their loads, since max/mean over ranks is {before:.2f}"]
        if after < _EVEN or self.spills:
            return []
        self._decides = False
        why = f"max/mean is {after:.2f} with experts placed by their loads"
        if self.num_nodes > 1:
            return [f"balance auto: {why}; ranks on {self.num_nodes} nodes do not borrow experts within steps"]
        self.spills = True
        return [f"balance auto: ranks on one node help each other out within steps, since {why}"]
