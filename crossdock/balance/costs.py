"""Whether moving weights for a step pays: what it takes against what it saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Rates", "SpillCosts"]


class Rates(NamedTuple):
    """What this machine does, the same on all ranks (`measure_rates`).

    Attributes:
        bytes_per_second: that leave a rank, and as many that arrive, while all ranks send.
        flops_per_second: of the experts' products, on one rank.
        seconds_per_exchange: of one that carries nothing.
    """

    bytes_per_second: float
    flops_per_second: float
    seconds_per_exchange: float


@dataclass(frozen=True)
class SpillCosts:
    """Predicts seconds of a training step's forward and backward pass through one layer.

    Computing follows the slowest rank: `3 * flops_per_route` per route, since a backward pass computes twice what the
    forward pass does. Of moving weights, three exchanges carry each borrowed expert's bytes: its weights in the
    forward pass, again in the backward pass, and its gradient back. Each takes as long as the rank with the most bytes
    out or in. The first one leaves together with the step's tokens, so its latency is hidden behind theirs, but not its
    bytes: both share the links. The other two wait for nothing and nothing waits with them. That is the dear end of
    what can happen; where the links idle meanwhile, moving is cheaper than said here. Tokens are taken to travel as
    far either way.

    Args:
        bytes_per_expert: of its weights, as they travel.
        flops_per_route: of one forward pass: `6 H I` for gated experts.
        rates: of this machine.
    """

    bytes_per_expert: float
    flops_per_route: float
    rates: Rates

    def seconds_saved(self, routes: int) -> float:
        """Of a step whose slowest rank computes so many `routes` less."""
        return 3 * routes * self.flops_per_route / self.rates.flops_per_second

    def seconds_spent(self, experts: int) -> float:
        """On moving, where the busiest rank lends or borrows so many `experts`, each counted once per borrower."""
        if not experts:
            return 0.0
        carried = 3 * experts * self.bytes_per_expert / self.rates.bytes_per_second
        return carried + 2 * self.rates.seconds_per_exchange
