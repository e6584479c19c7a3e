"""What is moved and computed: one MoE layer's sizes, and routes drawn by a known law."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Skew", "Workload", "parse_skew"]

# Times that repeated routes are drawn again before a token's are completed, and of how many tokens at once.
_ROUNDS, _AT_ONCE = 64, 1024


@dataclass(frozen=True)
class Skew:
    """How popular experts are: in proportion to `1 / r^exponent` by their rank `r`; 0 is uniform."""

    exponent: float

    def __str__(self) -> str:
        return f"Zipf({self.exponent:g})" if self.exponent else "uniform"


def parse_skew(text: str) -> Skew:
    """`uniform` or `zipf:1`. Raises ValueError."""
    if text == "uniform":
        return Skew(0.0)
    name, _, exponent = text.partition(":")
    try:
        value = float(exponent)
    except ValueError:
        value = -1.0
    if name != "zipf" or not math.isfinite(value) or not 0 <= value <= 4:
        raise ValueError(f"{text!r} must be uniform, or zipf:S with S from 0 to 4, such as zipf:1")
    return Skew(value)


@dataclass(frozen=True)
class Workload:
    """A layer, and the tokens that each rank has for it.

    Attributes:
        num_ranks: `R`, that hold the experts together.
        ranks_per_node: consecutive ranks that share a node; `R` where there is one node.
        num_experts: `E`; `ceil(E / R)` slots per rank.
        top_k: `K`.
        hidden_size: `H`.
        intermediate_size: `I`.
        tokens: `T` of each rank.
        dtype: of activations.
        skew: of the routes.
        seed: of the routes.
    """

    num_ranks: int
    ranks_per_node: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    tokens: int
    dtype: torch.dtype
    skew: Skew
    seed: int = 0

    @property
    def num_nodes(self) -> int:
        return -(-self.num_ranks // self.ranks_per_node)

    @property
    def has_levels(self) -> bool:
        """Whether there are several nodes of as many ranks each, and of several."""
        return 1 < self.ranks_per_node < self.num_ranks and self.num_ranks % self.ranks_per_node == 0

    def draw(self) -> np.ndarray:
        """The experts of all tokens, `[R, T, K]` int64: distinct ones, drawn one after another by `skew`.

        Which experts are popular is shuffled. A route that would repeat one of its token's is drawn again, which is
        the same as drawing without replacement, and needs no table of tokens by experts.
        """
        random = np.random.default_rng(self.seed)
        popularity = 1 / np.arange(1, self.num_experts + 1) ** self.skew.exponent
        order = random.permutation(self.num_experts)
        bounds = np.cumsum(popularity) / popularity.sum()

        def fresh(number: int) -> np.ndarray:
            drawn = np.searchsorted(bounds, random.random(number), side="right")
            return order[np.minimum(drawn, self.num_experts - 1)]

        shape = (self.num_ranks * self.tokens, self.top_k)
        routes = fresh(shape[0] * shape[1]).reshape(shape)
        rows = np.arange(len(routes))
        for _ in range(_ROUNDS if self.top_k > 1 else 0):
            repeated = _repeats(routes[rows])
            rows, repeated = rows[repeated.any(axis=1)], repeated[repeated.any(axis=1)]
            if len(rows):
                again = routes[rows]
                again[repeated] = fresh(int(repeated.sum()))
                routes[rows] = again
        for first in range(0, len(rows), _AT_ONCE):
            self._complete(routes, rows[first : first + _AT_ONCE], popularity[np.argsort(order)], random)
        return routes.reshape(self.num_ranks, self.tokens, self.top_k)

    def _complete(
        self, routes: np.ndarray, rows: np.ndarray, popularity: np.ndarray, random: np.random.Generator
    ) -> None:
        """Draw what is repeated in some `rows` of `routes` among the experts that they lack, which is as good.

        Where a token needs nearly all experts, the rare ones would not turn up in any time. The smallest of times that
        are exponential with rates `popularity` `[E]` are drawn as one after another without replacement.
        """
        chosen = routes[rows]
        repeated = _repeats(chosen)
        times = random.exponential(size=(len(rows), self.num_experts)) / popularity
        np.put_along_axis(times, chosen, np.inf, axis=1)
        soonest = np.argsort(times, axis=1)
        chosen[repeated] = np.take_along_axis(soonest, repeated.cumsum(axis=1) - 1, axis=1)[repeated]
        routes[rows] = chosen


def _repeats(routes: np.ndarray) -> np.ndarray:
    """`[N, K]` bool: which of a token's routes an earlier one of it has already."""
    order = np.argsort(routes, axis=1, kind="stable")
    in_order = np.take_along_axis(routes, order, axis=1)
    repeated = np.zeros(routes.shape, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
    return repeated
