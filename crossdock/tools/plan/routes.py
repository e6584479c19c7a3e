"""Where a rank's tokens go: assumed, drawn by a law, or as a run has recorded them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from crossdock.config import Config
from crossdock.routing import deal_out, draw_zipf
from crossdock.tools.plan.model import ModelFacts
from crossdock.tools.report.load import LOAD_FILE, LoadFileError, read_load

__all__ = ["RankRoutes", "Skew", "SkewError", "read_skew"]

# So many tokens say what shares are.
_SAMPLE = 4096


class SkewError(ValueError):
    """A skew that cannot be taken; the message says what would do."""


class _Sample:
    """Tokens and the expert-parallel rank of each of their routes, `[T', K]`; counts are made once."""

    def __init__(self, ranks: Tensor, num_ranks: int) -> None:
        self.ranks, self.num_ranks = ranks, num_ranks
        self._distinct: dict[int, list[int]] = {}

    def distinct(self, size: int) -> list[int]:
        """Tokens that need each group of `size` ranks."""
        if size not in self._distinct:
            places = self.ranks // size
            needed = torch.zeros(len(places), self.num_ranks // size, dtype=torch.bool).scatter_(1, places, True)
            self._distinct[size] = needed.sum(dim=0).tolist()
        return self._distinct[size]

    @cached_property
    def routes(self) -> list[int]:
        return torch.bincount(self.ranks.flatten(), minlength=self.num_ranks).tolist()

    @cached_property
    def busiest(self) -> int:
        return max(range(self.num_ranks), key=self.routes.__getitem__)

    @cached_property
    def imbalance(self) -> float:
        return max(self.routes) * self.num_ranks / max(sum(self.routes), 1)


@dataclass(frozen=True, eq=False)
class RankRoutes:
    """Of the tokens of one rank, in one micro-batch and layer.

    Attributes:
        tokens: how many there are.
        sample: where they go, or a sample of them.
    """

    tokens: int
    sample: _Sample

    @classmethod
    def of(cls, tokens: int, num_ranks: int, ranks: Tensor) -> RankRoutes:
        """From the expert-parallel rank of each route, `[T', K]`, of all tokens or a sample of them."""
        return cls(tokens, _Sample(ranks, num_ranks))

    @property
    def num_ranks(self) -> int:
        return self.sample.num_ranks

    @property
    def rows(self) -> tuple[int, ...]:
        """To each rank, each token once."""
        return self.node_rows(1)

    def node_rows(self, size: int) -> tuple[int, ...]:
        """To each node of `size` ranks, each token once."""
        return self._scaled(self.sample.distinct(size))

    @property
    def routes(self) -> tuple[int, ...]:
        """To each rank, each token once for each of its experts there."""
        return self._scaled(self.sample.routes)

    @property
    def busiest(self) -> int:
        """The rank with the most routes, the first of several."""
        return self.sample.busiest

    @property
    def imbalance(self) -> float:
        """Routes of the busiest rank over the mean."""
        return self.sample.imbalance

    def chunks(self, count: int) -> list[RankRoutes]:
        """As a layer cuts its tokens."""
        sizes = [len(part) for part in torch.empty(self.tokens, 0).tensor_split(count)]
        parts = self.sample.ranks.tensor_split(count)
        return [RankRoutes.of(size, self.num_ranks, part) for size, part in zip(sizes, parts, strict=True)]

    def all_to_busiest(self) -> RankRoutes:
        """Were every token to choose experts of the first rank alone."""
        return RankRoutes.of(self.tokens, self.num_ranks, torch.zeros_like(self.sample.ranks))

    def with_tokens(self, tokens: int) -> RankRoutes:
        """As many others, spread alike."""
        return RankRoutes(tokens, self.sample)

    def _scaled(self, counts: list[int]) -> tuple[int, ...]:
        scale = self.tokens / max(len(self.sample.ranks), 1)
        return tuple(round(count * scale) for count in counts)


@dataclass(frozen=True)
class Skew:
    """How tokens are spread over experts.

    Attributes:
        name: in words.
        zipf: exponent of a Zipf law, expert 0 the most popular; `None` for `loads`.
        loads: routes of each expert, as a run has recorded them for its most uneven layer.
        dealt: experts in turn, as `training.debug_moe_force_load_balance` has it.
        shuffle_seed: of the order of popularity; as `moe.debug_force_zipf_seed`.
        exact: take every token, not a sample.
    """

    name: str = "uniform"
    zipf: float | None = 0.0
    loads: tuple[int, ...] = ()
    dealt: bool = False
    shuffle_seed: int | None = None
    exact: bool = False

    def expert_ids(self, tokens: int, facts: ModelFacts) -> Tensor:
        """`[T', K]`, of as many tokens as there are where that is `exact`, or of a sample."""
        count = tokens if self.exact else _SAMPLE
        sizes = count, facts.num_experts, facts.top_k
        if self.dealt:
            return deal_out(*sizes, None, torch.device("cpu"))
        if self.zipf is not None:
            return draw_zipf(*sizes, self.zipf, self.shuffle_seed, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        gumbel = -torch.empty(count, facts.num_experts, dtype=torch.float64).exponential_(generator=generator).log()
        return (gumbel + torch.tensor(self.loads, dtype=torch.float64).log()).topk(facts.top_k, dim=-1).indices

    def of_ranks(self, tokens: int, num_ranks: int, facts: ModelFacts, ids: Tensor | None = None) -> RankRoutes:
        """The rows and routes of `tokens` tokens of one rank to each of `num_ranks`.

        Args:
            tokens: `T` of the rank.
            num_ranks: `ep`.
            facts: of the model.
            ids: what `expert_ids` has given, to not draw again.
        """
        ids = self.expert_ids(tokens, facts) if ids is None else ids
        experts, slots = torch.arange(facts.num_experts), facts.num_experts
        # As `Placement.contiguous`: rank g holds g E // R up to (g + 1) E // R - 1.
        owner = ((experts + 1) * num_ranks - 1) // slots
        return RankRoutes.of(tokens, num_ranks, owner[ids])


def read_skew(text: str, config: Config, facts: ModelFacts) -> Skew:
    """`uniform`, `zipf:1`, or the folder of a run; what a run's settings force goes before.

    Raises:
        SkewError: for anything else.
    """
    if config.training.debug_moe_force_load_balance:
        return Skew("dealt out in turn (training.debug_moe_force_load_balance)", dealt=True, exact=True)
    if config.moe.debug_force_zipf >= 0:
        seed = config.moe.debug_force_zipf_seed
        name = f"zipf:{config.moe.debug_force_zipf:g} (moe.debug_force_zipf)"
        return Skew(name, config.moe.debug_force_zipf, shuffle_seed=None if seed < 0 else seed, exact=True)
    if text == "uniform":
        return Skew()
    if text.startswith("zipf:"):
        try:
            exponent = float(text.removeprefix("zipf:"))
        except ValueError:
            exponent = -1.0
        if not (math.isfinite(exponent) and 0 <= exponent <= 10):
            raise SkewError(f"--skew = {text!r}\nzipf:EXPONENT with a number from 0 (uniform) to 10, such as zipf:1")
        return Skew(text, exponent)
    return _recorded(Path(text), text, facts)


def _recorded(folder: Path, text: str, facts: ModelFacts) -> Skew:
    path = folder / LOAD_FILE if folder.is_dir() else folder
    if not path.is_file():
        valid = f"uniform, zipf:EXPONENT, or the folder of a run, which holds {LOAD_FILE}"
        raise SkewError(f"--skew = {text!r}\n{valid}")
    try:
        _, counts, _ = read_load(path)
    except (LoadFileError, OSError) as error:
        raise SkewError(f"--skew = {text!r}\n{error}") from None
    if not len(counts):
        raise SkewError(f"--skew = {text!r}\nit holds no record")
    if counts.shape[2] != facts.num_experts:
        raise SkewError(f"--skew = {text!r}\nit is of {counts.shape[2]} experts, the model has {facts.num_experts}")
    last = torch.from_numpy(counts[len(counts) // 2 :].astype("int64")).sum(dim=0)
    worst = int((last.max(dim=1).values / last.sum(dim=1).clamp_min(1)).argmax())
    # An expert without a route keeps a chance: with fewer experts than top-k the draw could not choose.
    loads = tuple(max(int(count), 1) for count in last[worst].tolist())
    return Skew(f"recorded in {path}, layer {worst}, the most uneven", None, loads)
