"""A plan: the layout that was asked for, others, and how it scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from crossdock.config import Config, check_ring, ranks_per_group, validate
from crossdock.parallel import ParallelDims
from crossdock.tools.plan.advice import advice
from crossdock.tools.plan.auto import settle
from crossdock.tools.plan.counting import ACTIVATIONS, BUFFERS, GRADIENTS, OPTIMIZER, PARAMETERS
from crossdock.tools.plan.devices import Device
from crossdock.tools.plan.estimate import Estimator, with_layout
from crossdock.tools.plan.extended import DryRun, Runner, calibrate, extended_run
from crossdock.tools.plan.figures import Estimate, Memory
from crossdock.tools.plan.flows import CPU
from crossdock.tools.plan.model import ModelFacts, plan_model, read_model
from crossdock.tools.plan.routes import RankRoutes, read_skew
from crossdock.tools.plan.search import Found, ScaleRow, scale, search
from crossdock.tools.plan.sizes import copies_bytes, num_micro_batches
from crossdock.tools.plan.traffic import counted_flows

__all__ = ["Plan", "PlanOptions", "make_plan"]

_CHECKED = 2
_KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, BUFFERS)


@dataclass(frozen=True)
class PlanOptions:
    """What is asked for.

    Attributes:
        ranks: GPUs of the run.
        device: of the table.
        skew: as `read_skew` takes it.
        search: whether to rank all layouts.
        scale: numbers of ranks for the tables of scaling; none without.
        degrees: of expert parallelism, for these.
        tokens: of the whole training, for days and cost; 0 without.
        achieved: share of the device's peak in place of the table's.
    """

    ranks: int
    device: Device
    skew: str = "uniform"
    search: bool = False
    scale: tuple[int, ...] = ()
    degrees: tuple[int, ...] = ()
    tokens: float = 0.0
    achieved: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a plan came to.

    Attributes:
        options: what was asked for.
        facts: of the model.
        estimate: of the layout that the settings have.
        run: the dry run of its busiest rank; `None` where there is none, as for a pipeline.
        warnings: what experience warns of.
        chosen: settings that were open, and why they are so.
        skew, calibration: where these are from.
        found: of a search.
        strong, weak: tables of scaling.
    """

    options: PlanOptions
    facts: ModelFacts
    estimate: Estimate
    run: DryRun | None
    warnings: list[str]
    chosen: list[str]
    skew: str
    calibration: str
    found: Found | None = None
    strong: list[ScaleRow] = field(default_factory=list)
    weak: list[ScaleRow] = field(default_factory=list)


def make_plan(config: Config, options: PlanOptions, run: Runner) -> Plan:
    """Plan a run.

    Args:
        config: of the run.
        options: what is asked for.
        run: `crossdock.train.dry_run.dry_run`.

    Raises:
        ConfigError: for a layout that breaks a rule, as `train` refuses it.
        SkewError: for a skew that cannot be taken.
    """
    device = options.device
    if options.achieved is not None:
        device = replace(device, achieved=options.achieved)
    ranks = ranks_per_group(config, options.ranks)
    config, chosen = settle(config, ranks, device)
    dims = validate(config, ranks, device.node_size, elsewhere=True)
    if _has_ring(config):
        check_ring(config, on_gpu=device.name != CPU)
    facts = read_model(plan_model(config))
    skew = read_skew(options.skew, config, facts)
    runner = _remembering(run, device)
    estimator = Estimator(facts, device, skew)
    if _has_dry_run(config, device):
        estimator.calibration = calibrate(estimator, runner, config, dims)
    estimate, counted = checked(estimator, runner, config, dims)
    found = None
    if options.search:
        found = search(estimator, config, ranks)
        best = [checked(estimator, runner, each.config, each.dims)[0] for each in found.ranked[:_CHECKED]]
        ranked = [each for each in best if each.fits] + found.ranked[_CHECKED:]
        found = replace(found, ranked=sorted(ranked, key=lambda each: -each.tokens_per_second))
    strong: list[ScaleRow] = []
    weak: list[ScaleRow] = []
    if options.scale:
        strong, weak = scale(estimator, config, options.scale, options.degrees or (dims.ep,))
    return Plan(
        options,
        facts,
        estimate,
        counted,
        advice(estimate, estimator),
        chosen,
        skew.name,
        estimator.calibration.source,
        found,
        strong,
        weak,
    )


def checked(estimator: Estimator, run: Runner, config: Config, dims: ParallelDims) -> tuple[Estimate, DryRun | None]:
    """An estimate whose memory and bytes sent are what a dry run of the busiest rank counts; of a pipeline, adapters,
    a ring, and eager experts on a CPU, the formulas'."""
    estimate = estimator.estimate(config, dims)
    if dims.pp > 1 or not _has_dry_run(config, estimator.device):
        return estimate, None
    routes = estimator.routes(config, dims)

    def of_micro_batches(count: int) -> DryRun:
        size = config.training.local_batch_size
        short = with_layout(config, dims, size, size * dims.dp_replicate * dims.dp_shard * count)
        return extended_run(run, short, dims, routes.busiest, estimator.facts, routes)

    count = num_micro_batches(config, dims)
    counted = of_micro_batches(min(count, 2))  # More of them hold no more.
    one = of_micro_batches(1) if count > 2 else counted
    flows = counted_flows(estimate.flows, one.counted, counted.counted, count, routes.busiest, estimator.device)
    # With offload these are the host's; a dry run has one memory for all.
    elsewhere = (PARAMETERS, GRADIENTS, OPTIMIZER) if config.training.enable_cpu_offload else ()
    held = {
        phase: {name: 0 if name in elsewhere else kinds.get(name, 0) for name in _KINDS}
        for phase, kinds in counted.counted.kinds.items()
    }
    phase = max(held, key=lambda phase: sum(held[phase].values()))
    memory = Memory(*(float(held[phase][name]) for name in _KINDS))
    # A dry run balances nothing.
    memory = replace(memory, buffers=memory.buffers + copies_bytes(config, estimator.facts, dims))
    return replace(estimate, memory=memory, flows=flows, measured=phase), counted


def _has_dry_run(config: Config, device: Device) -> bool:
    """Whether a step can run with fake tensors: shapes of eager experts and of adapters depend on counts, and torch's
    ring attention needs a GPU."""
    eager = config.training.dtype == "float64" or (config.moe.experts == "eager" and device.name == CPU)
    return not config.lora.rank and not eager and not _has_ring(config)


def _has_ring(config: Config) -> bool:
    parallelism = config.parallelism
    return parallelism.context_parallel_degree > 1 and parallelism.context_parallel_method == "ring"


def _remembering(run: Runner, device: Device) -> Runner:
    """A runner that makes no run twice, and runs what can run without the device and its libraries."""
    known: dict[tuple[object, ...], DryRun] = {}

    def remembered(
        config: Config, dims: ParallelDims, rank: int, routes: RankRoutes, blocks: Sequence[int] | None
    ) -> DryRun:
        config = _without_hardware(config, device)
        key = repr((config, dims)), rank, routes.tokens, routes.sample, None if blocks is None else tuple(blocks)
        if key not in known:
            known[key] = run(config, dims, rank, routes, blocks)
        return known[key]

    return remembered


def _without_hardware(config: Config, device: Device) -> Config:
    """Settings for a dry run: what moves and computes on the device, by what this process has and holds as much."""
    moe = config.moe
    if moe.dispatcher in ("deepep", "symmetric"):
        moe = replace(moe, dispatcher="alltoall", **_plain_deepep())
    if moe.experts in ("auto", "triton", "eager") and device.name != CPU:
        moe = replace(moe, experts="grouped_mm")
    if not moe.ranks_per_node:
        moe = replace(moe, ranks_per_node=device.node_size)
    model = replace(config.model, kernels="none", attn_implementation="sdpa")
    return replace(config, moe=moe, model=model, compile=replace(config.compile, enable=False))


def _plain_deepep() -> dict[str, object]:
    return {
        "deepep_api": "auto",
        "deepep_num_sms": 0,
        "deepep_dispatch_chunk": 0,
        "deepep_combine_chunk": 0,
        "deepep_fp8_dispatch": False,
        "deepep_expand": False,
        "deepep_max_tokens_per_rank": 0,
    }
