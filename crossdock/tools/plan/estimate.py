"""What a layout takes: memory by kind, bytes by kind and link, and time, by formulas that dry runs calibrate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from crossdock.config import Config, expert_parallel_degrees
from crossdock.models import ExpertSizes
from crossdock.parallel import ParallelDims, stages_per_rank
from crossdock.tools.plan.devices import Device
from crossdock.tools.plan.figures import Calibration, Estimate, Memory, Work
from crossdock.tools.plan.flows import Flow, dispatch_plan, expert_flow
from crossdock.tools.plan.model import BlockFacts, ModelFacts
from crossdock.tools.plan.routes import RankRoutes, Skew
from crossdock.tools.plan.sizes import (
    copies_bytes,
    end_parameters,
    gathered_parameters,
    local_parameters,
    local_tokens,
    num_micro_batches,
    over_blocks,
    slots_per_rank,
    trained_locally,
    value_sizes,
)
from crossdock.tools.plan.traffic import edge_seconds, formula_flows

__all__ = ["Estimator", "with_layout"]

# Rows at which a grouped product reaches half of what it could: half a tile of 128.
_HALF_ROWS = 64
# What an AdamW step reads and writes of a parameter, all in float32: four and three values.
_OPTIMIZER_BYTES = 28


class Estimator:
    """Estimates any layout of a model on a device.

    Args:
        facts: of the model.
        device: of the table.
        skew: how tokens spread.
        calibration: what the formulas are multiplied by.
        spare: share of the device's memory that stays free, for what is not counted: the driver's context, buffers of
            NCCL, fragments.
    """

    def __init__(
        self,
        facts: ModelFacts,
        device: Device,
        skew: Skew | None = None,
        calibration: Calibration | None = None,
        spare: float = 0.05,
    ) -> None:
        self.facts, self.device, self.skew = facts, device, skew or Skew()
        self.calibration = calibration or Calibration()
        self.limit = device.memory_gib * 2**30 * (1 - spare)
        self._routes: dict[tuple[int, int], RankRoutes] = {}
        self._ids: dict[int, torch.Tensor] = {}

    def routes(self, config: Config, dims: ParallelDims) -> RankRoutes:
        """Of a rank's tokens of one micro-batch."""
        tokens = local_tokens(config, dims)
        key = tokens if self.skew.exact else 0, dims.ep
        if key[0] not in self._ids:
            self._ids[key[0]] = self.skew.expert_ids(tokens, self.facts)
        if key not in self._routes:
            self._routes[key] = self.skew.of_ranks(tokens, dims.ep, self.facts, self._ids[key[0]])
        return self._routes[key].with_tokens(tokens)

    def estimate(self, config: Config, dims: ParallelDims) -> Estimate:
        """Of a layout that breaks no rule."""
        routes = self.routes(config, dims)
        plan = dispatch_plan(config, dims, self.facts, routes.tokens, self.device)
        micro_batches = num_micro_batches(config, dims)
        exchange = expert_flow(config, dims, self.facts, routes, self.device, plan)
        flows = formula_flows(config, dims, self.facts, self.device, exchange, micro_batches)
        work = self._work(config, dims, routes, flows, exchange, plan.overlap_chunks, micro_batches)
        return Estimate(
            config,
            dims,
            micro_batches,
            self.memory(config, dims, routes, micro_batches),
            flows,
            work,
            self.facts.flops_per_token(config.training.seq_len),
            str(plan),
            plan.overlap_chunks,
            routes,
            self.device,
            self.limit,
        )

    def with_ep(self, config: Config, dims: ParallelDims, ep: int) -> Estimate | None:
        """The same with another degree of expert parallelism; `None` where that breaks a rule."""
        other = replace(dims, ep=ep)
        sizes = ExpertSizes(self.facts.num_experts, self.facts.hidden_size, self.facts.intermediate_size)
        if ep not in expert_parallel_degrees(sizes, dims.replica_size):
            return None
        training = config.training
        config = with_layout(config, other, training.local_batch_size, training.global_batch_size)
        if ep == 1:
            config = replace(config, moe=replace(config.moe, dispatcher="auto", overlap_chunks=0))
        return self.estimate(config, other)

    def at_worst(self, config: Config, dims: ParallelDims) -> float:
        """Bytes of a rank that gets every token of its expert-parallel group, for all their experts."""
        routes = self.routes(config, dims)
        worst = routes.all_to_busiest()
        return self.memory(config, dims, worst, num_micro_batches(config, dims)).total

    def memory(self, config: Config, dims: ParallelDims, routes: RankRoutes, micro_batches: int) -> Memory:
        """Of the stage of the pipeline that holds most."""
        stages = range(dims.pp) if dims.pp <= 2 else (0, 1, dims.pp - 1)
        return max(
            (self._stage_memory(config, dims, routes, micro_batches, stage) for stage in stages),
            key=lambda memory: memory.total,
        )

    def _stage_memory(
        self, config: Config, dims: ParallelDims, routes: RankRoutes, micro_batches: int, stage: int
    ) -> Memory:
        facts, calibration = self.facts, self.calibration
        wide, item = value_sizes(config)
        blocks = over_blocks(facts, dims)
        ends = end_parameters(facts, dims, stage)
        fsdp, tp = dims.dp_shard * dims.cp, dims.tp
        held = blocks(lambda kind: local_parameters(kind, facts, dims)) + ends / tp / fsdp
        gathered = blocks(lambda kind: gathered_parameters(kind, facts, dims))
        block = max(gathered_parameters(kind, facts, dims) for kind in facts.kinds)
        parallelism = config.parallelism
        step_reduction = dims.pp > 1 or (parallelism.gradient_reduction == "step" and micro_batches > 1)
        buffers = (2 * block if parallelism.reshards else gathered) * item + ends / tp * item
        # A block's gradients before they are reduced, and the same in float32 on their way.
        buffers += block * (item + 4 if item < wide else 2 * wide)
        if step_reduction:
            buffers += (gathered + ends / tp) * (4 if item < wide else wide)
        buffers += copies_bytes(config, facts, dims)
        in_flight = self._in_flight(config, dims, stage, micro_batches)
        kept = in_flight * blocks(lambda kind: self.kept(kind, config, dims, routes)) * calibration.block
        working = max(self.working(kind, config, dims, routes) for kind in facts.kinds) * calibration.working
        head = self.head(config, dims) * calibration.ends if stage == dims.pp - 1 else 0.0
        adam = 2 * wide
        if config.optimizer.name == "muon":
            vectors = ends / tp / fsdp + blocks(lambda kind: kind.rest / fsdp)
            adam = (held + vectors) / max(held, 1) * wide
        trained = blocks(lambda kind: trained_locally(kind, facts, dims)) + facts.trains_ends * ends / tp / fsdp
        state = held * wide, trained * wide, trained * adam
        if config.training.enable_cpu_offload:
            state = 0.0, 0.0, 0.0
        if calibration.activation_bytes is not None:
            return Memory(*state, calibration.activation_bytes * routes.tokens, buffers)
        # Gradients grow as activations go, but for those of earlier micro-batches.
        begins = Memory(state[0], state[1] if micro_batches > 1 else 0.0, state[2], kept + max(working, head), buffers)
        ends_with = Memory(*state, working, buffers)
        return max(begins, ends_with, key=lambda memory: memory.total)

    def _in_flight(self, config: Config, dims: ParallelDims, stage: int, micro_batches: int) -> float:
        if dims.pp == 1:
            return 1
        parallelism = config.parallelism
        if parallelism.pipeline_parallel_schedule == "gpipe":
            return micro_batches
        if parallelism.pipeline_parallel_schedule == "1f1b":
            return min(micro_batches, dims.pp - stage)
        chunks = stages_per_rank(parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_stages_per_rank)
        return min(micro_batches, (2 * (dims.pp - stage - 1) + (chunks - 1) * dims.pp + 1) / chunks + 1)

    def kept(self, kind: BlockFacts, config: Config, dims: ParallelDims, routes: RankRoutes) -> float:
        """Bytes that a block keeps of a micro-batch for its backward pass, before calibration.

        In values of the activations' dtype: `none` keeps what norms, attention, router and exchanges have read;
        `selective` the outputs of products, attention and exchanges; `full` the block's input.
        """
        _, item = value_sizes(config)
        hidden = self.facts.hidden_size
        if config.activation_checkpoint.mode == "full":
            return routes.tokens * hidden * item
        return self._live(kind, config, dims, routes, all_of_it=config.activation_checkpoint.mode == "none")

    def working(self, kind: BlockFacts, config: Config, dims: ParallelDims, routes: RankRoutes) -> float:
        """Bytes that a block's backward pass needs beside what is kept: what it computes again, and gradients."""
        _, item = value_sizes(config)
        live = self._live(kind, config, dims, routes, all_of_it=True)
        again = live if config.activation_checkpoint.mode != "none" else 0.0
        return again + 0.5 * live + 4 * routes.tokens * self.facts.hidden_size * item

    def _live(
        self, kind: BlockFacts, config: Config, dims: ParallelDims, routes: RankRoutes, *, all_of_it: bool
    ) -> float:
        facts, (_, item) = self.facts, value_sizes(config)
        busiest = routes.busiest
        heads = (facts.num_heads + 2 * facts.num_key_value_heads) * facts.head_dim
        # Attention has whole sequences for a share of the heads: as many values either way.
        per_token = item * (facts.hidden_size * 2 + heads + facts.num_heads * facts.head_dim)
        if all_of_it:
            per_token += item * (6 * facts.hidden_size + 3 * heads)
        dense = routes.tokens * per_token
        if not kind.slot:
            inner = kind.matrices / max(facts.hidden_size, 1)
            return dense + routes.tokens * inner * item
        dense += routes.tokens * (3 * 4 * facts.num_experts + 8 * facts.top_k)
        arriving = routes.rows[busiest] * dims.ep
        computed = routes.routes[busiest] * dims.ep
        sent = sum(routes.rows)
        rows = (arriving * 2 + sent * (1 if all_of_it else 0)) * facts.hidden_size * item
        width = 2 * facts.intermediate_size
        return dense + rows + arriving * facts.top_k * 12 + computed * (width * item + 8)

    def head(self, config: Config, dims: ParallelDims) -> float:
        """Bytes of the logits, in the activations' dtype and in float32, and of their gradients."""
        wide = max(value_sizes(config)[1], 4)
        _, item = value_sizes(config)
        rows = config.training.local_batch_size * config.training.seq_len // dims.cp
        return rows * self.facts.vocab_size / dims.tp * (item + 3 * wide)

    def _work(
        self,
        config: Config,
        dims: ParallelDims,
        routes: RankRoutes,
        flows: Mapping[str, Flow],
        exchange: Flow,
        chunks: int,
        micro_batches: int,
    ) -> Work:
        facts, device, seq_len = self.facts, self.device, config.training.seq_len
        achieved = device.achieved if self.calibration.achieved is None else self.calibration.achieved
        speed = device.peak_tflops * 1e12 * achieved
        if config.training.dtype != "bfloat16" and device.name != "cpu":
            speed /= 16  # float32 without tensor cores, about
        again = 4 / 3 if config.activation_checkpoint.mode == "full" else 1.0
        rows = max(routes.routes) * dims.ep / max(slots_per_rank(facts, dims), 1)
        products = rows / (rows + _HALF_ROWS)
        dense = experts = 0.0
        for kind in facts.kinds:
            of_dense, of_experts = facts.block_flops(kind, seq_len)
            no_dense, no_experts = facts.frozen_flops(kind)
            dense += kind.count * (again * of_dense - no_dense)
            experts += kind.count * (again * of_experts - no_experts)
        tokens = local_tokens(config, dims)
        ends = (6 if facts.trains_ends else 4) * (facts.head or facts.embedding)
        # The stage with the head does more; cut_blocks gives it fewer blocks for that.
        per_batch = tokens * dense / dims.pp / speed + tokens * ends / dims.pp / speed
        of_experts = tokens * experts / dims.pp / speed * routes.imbalance / products
        compute = micro_batches * (per_batch + of_experts)
        travelling = flows["expert exchange"].seconds if "expert exchange" in flows else 0.0
        hidden = 0.0 if chunks == 1 else min(travelling, micro_batches * of_experts) * (chunks - 1) / chunks
        quiet = [flows[name] for name in ("parameter gather", "gradient reduction", "replica sums") if name in flows]
        beside = sum(flow.seconds for flow in quiet)
        edges = min(beside, edge_seconds(config, dims, facts, device))
        over = max(0.0, beside - edges - compute)
        taken = device.collective_share * min(beside - edges, compute)
        layout = sum(flows[name].seconds for name in ("tensor parallel", "context parallel") if name in flows)
        bubble = 0.0
        if dims.pp > 1:
            schedule = config.parallelism.pipeline_parallel_schedule
            stages = stages_per_rank(schedule, config.parallelism.pipeline_parallel_stages_per_rank)
            waits = (dims.pp - 1) / stages * (0.5 if schedule in ("zero_bubble", "zbv") else 1.0)
            bubble = (compute + travelling - hidden + layout) * waits / micro_batches
        trained = over_blocks(facts, dims)(lambda kind: trained_locally(kind, facts, dims))
        update = trained * _OPTIMIZER_BYTES / (device.hbm_gbytes * 1e9)
        return Work(compute, travelling - hidden, edges + over + taken, layout, bubble, update)


def with_layout(config: Config, dims: ParallelDims, local_batch_size: int, global_batch_size: int) -> Config:
    """The settings with another layout and batch."""
    parallelism = replace(
        config.parallelism,
        data_parallel_replicate_degree=dims.dp_replicate,
        data_parallel_shard_degree=dims.dp_shard,
        context_parallel_degree=dims.cp,
        tensor_parallel_degree=dims.tp,
        pipeline_parallel_degree=dims.pp,
        expert_parallel_degree=dims.ep,
    )
    training = replace(config.training, local_batch_size=local_batch_size, global_batch_size=global_batch_size)
    return replace(config, parallelism=parallelism, training=training)
