"""Dry runs of few blocks, extended to as many as a model has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from crossdock.config import Config
from crossdock.parallel import ParallelDims
from crossdock.tools.plan.counting import ACTIVATIONS, Counted, Sent
from crossdock.tools.plan.estimate import Estimator, with_layout
from crossdock.tools.plan.figures import Calibration
from crossdock.tools.plan.model import ModelFacts
from crossdock.tools.plan.routes import RankRoutes

__all__ = ["DryRun", "Runner", "calibrate", "extended_run", "kept_blocks"]

_FEW = 4
"""Blocks of a model with one kind of them; what is gathered ahead reaches no further."""


@dataclass(frozen=True)
class DryRun:
    """What a step of one rank came to.

    Attributes:
        counted: bytes held in each phase, and sent by (operation, dimension of the layout).
        within, between, metadata: what dispatchers sent, as the metrics of a run count it.
        depth: blocks of the model that was run; 0 for all.
    """

    counted: Counted
    within: int
    between: int
    metadata: int
    depth: int = 0


Runner = Callable[[Config, ParallelDims, int, RankRoutes, Sequence[int] | None], DryRun]
"""`run(config, dims, rank, routes, blocks)`, as `crossdock.train.dry_run.dry_run`."""


def kept_blocks(facts: ModelFacts) -> list[list[int]]:
    """Which blocks dry runs have: a few of each kind first, then for each kind of which there are more one besides."""
    few = _FEW if len(facts.kinds) == 1 else 2
    of_kind = [[index for index, k in enumerate(facts.kind_of) if k == kind] for kind in range(len(facts.kinds))]
    base = [index for indices in of_kind for index in indices[:few]]
    runs = [sorted(base)]
    runs += [sorted([*base, indices[few]]) for indices in of_kind if len(indices) > few]
    return runs


def extended_run(
    run: Runner, config: Config, dims: ParallelDims, rank: int, facts: ModelFacts, routes: RankRoutes
) -> DryRun:
    """A step of the whole model, from dry runs of few blocks: each kind of block adds the same again.

    Bytes of a phase are linear in the number of blocks, and so is what is sent; the phases are those of the first two
    and the last two blocks, between which they change evenly.

    Raises:
        ValueError: for a pipeline, whose stages are cut by their cost.
    """
    if dims.pp > 1:
        raise ValueError("a pipeline's stages are not extended")
    first, *others = kept_blocks(facts)
    base = _by_place(run(config, dims, rank, routes, first), len(first))
    few = _FEW if len(facts.kinds) == 1 else 2
    total = base
    for kind, blocks in zip((k for k in facts.kinds if k.count > few), others, strict=True):
        more = _by_place(run(config, dims, rank, routes, blocks), len(blocks))
        total = _plus(total, base, more, kind.count - few)
    return replace(total, depth=len(first))


def _by_place(run: DryRun, depth: int) -> DryRun:
    """With the phases of blocks named by their place from either end; of those between, none."""
    peaks, kinds = {}, {}
    for phase, peak in run.counted.peaks.items():
        name = phase
        if found := re.fullmatch(r"backward of block (\d+)", phase):
            index = int(found[1])
            if 2 <= index < depth - 2:
                continue
            name = f"backward of block {index}" if index < 2 else f"backward of block {index - depth}"
        peaks[name], kinds[name] = peak, run.counted.kinds[phase]
    return replace(run, counted=Counted(peaks, kinds, run.counted.sent))


def _plus(total: DryRun, base: DryRun, more: DryRun, times: int) -> DryRun:
    """`total` and so many times what `more` has more than `base`."""

    def numbers(name: str) -> int:
        return getattr(total, name) + times * (getattr(more, name) - getattr(base, name))

    def table(a: Mapping[str, int], b: Mapping[str, int], c: Mapping[str, int]) -> dict[str, int]:
        return {key: value + times * (c.get(key, 0) - b.get(key, 0)) for key, value in a.items()}

    sums, ones, twos = total.counted, base.counted, more.counted
    kinds = {
        phase: table(kinds, ones.kinds.get(phase, {}), twos.kinds.get(phase, {})) for phase, kinds in sums.kinds.items()
    }
    sent = {}
    for key, each in sums.sent.items():
        before, after = ones.sent[key], twos.sent[key]
        rows = zip(each.to_ranks, before.to_ranks, after.to_ranks, strict=True)
        sent[key] = Sent(
            each.ranks,
            each.calls + times * (after.calls - before.calls),
            tuple(a + times * (c - b) for a, b, c in rows),
            each.in_ring + times * (after.in_ring - before.in_ring),
        )
    counted = Counted(table(sums.peaks, ones.peaks, twos.peaks), kinds, sent)
    return DryRun(counted, numbers("within"), numbers("between"), numbers("metadata"))


def calibrate(estimator: Estimator, run: Runner, config: Config, dims: ParallelDims) -> Calibration:
    """What dry runs of a layout, without a pipeline, say of the formulas for activations.

    Returns:
        Factors by which what was counted is more than the formulas': of what a block keeps, what it needs in its
        backward pass, and what the head needs.
    """
    facts = estimator.facts
    flat = replace(dims, pp=1, dp_replicate=dims.dp_replicate * dims.pp) if dims.pp > 1 else dims
    size = config.training.local_batch_size
    config = with_layout(config, flat, size, size * flat.dp_replicate * flat.dp_shard)
    routes = estimator.routes(config, flat)
    rank = routes.busiest
    blocks = kept_blocks(facts)
    runs = [_by_place(run(config, flat, rank, routes, chosen), len(chosen)) for chosen in blocks[:1] + blocks[-1:]]
    few, more = (each.counted.kinds for each in runs)
    if len(blocks) == 1:
        return Calibration(source="formulas alone: the model has few blocks")
    kind = [k for k in facts.kinds if k.count > (_FEW if len(facts.kinds) == 1 else 2)][-1]
    kept = more["forward"][ACTIVATIONS] - few["forward"][ACTIVATIONS]
    held = len(blocks[0]) * kept
    last = "backward of block -1"
    working = few[last][ACTIVATIONS] - held
    ends = few["backward"][ACTIVATIONS] - held

    def factor(counted: float, formula: float) -> float:
        return max(counted / formula, 0.05) if formula else 1.0

    return replace(
        estimator.calibration,
        block=factor(kept, estimator.kept(kind, config, flat, routes)),
        working=factor(working, estimator.working(kind, config, flat, routes)),
        ends=factor(ends, estimator.head(config, flat)),
        source=f"dry runs of {len(blocks[0])} and {len(blocks[-1])} blocks on {flat}",
    )
