"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crossdock.balance import Balancer
from crossdock.checkpoint import (
    CHECKPOINT_FOLDER,
    CheckpointError,
    materialise_optimizer_state,
    newest_whole,
)
from crossdock.comm import raise_together
from crossdock.config import ASSETS_FOLDER, Config, with_settled_batch, write_run_settings
from crossdock.data import IGNORED_LABEL, Batch, DataError, TokenBatches, TooLong, evaluation_batches
from crossdock.dispatch import Traffic
from crossdock.models import FAMILIES, batch_loss, export_hf, left_out, save_peft_adapter
from crossdock.moe import finish_step, moe_layer_places, moe_layers, set_batch_totals, step_load
from crossdock.parallel import Boundary, GradientManager, GroupPlace, ParallelDims, Pipeline, plain_name
from crossdock.routing import CollapseMonitor
from crossdock.tools.evaluate import evaluate
from crossdock.train.bad_steps import BadSteps
from crossdock.train.drift import ReplicaCheck
from crossdock.train.fingerprints import check_same_code_and_config, check_same_model
from crossdock.train.keeping import RunKeeper
from crossdock.train.layer_marks import mark_layers
from crossdock.train.live import LiveState, check_alike, fingerprint, join_groups, sum_everywhere
from crossdock.train.metrics import gather_metrics, load_metrics, say, traffic_metrics
from crossdock.train.optimizer import build_optimizer, learning_rate_factor
from crossdock.train.preparing import build_training_model, prepare_run_tokens
from crossdock.train.record import RunRecord, one_at_a_time
from crossdock.train.stopping import StopSignal
from crossdock.train.together import TrainingStopped, first_named, from_first_rank, together
from crossdock.train.watching import RunWatch, group_timeout
from crossdock.train.writing import Writing

__all__ = ["Trainer", "TrainingStopped"]

logger = logging.getLogger(__name__)

_Taken = tuple[dict[str, Any], torch.Tensor]

EXPORT_FOLDER = "hf"
ADAPTER_FOLDER = "adapter"


class Trainer:
    """One rank of a training run. Needs the default process group; every method is collective.

    Args:
        config: validated, with `job.dump_folder` set on one rank at least.
        dims: the layout.
        device: of this rank.
        first_on_machine: this rank prepares the data for the others of its machine.
        stop: asks for an early end.
        threads: whether a tuned number of threads may take the place of this process's.
        settings: what the run was asked for, and its folder remembers, where `config` is what fits fewer ranks.
        progress: a file that is made once a step is done.
        machine: number of this rank's machine.
        watch: watches over this rank; by default nobody does.
        in_group: place of these ranks among replica groups, where the run has some.
    """

    def __init__(
        self,
        config: Config,
        dims: ParallelDims,
        device: torch.device,
        first_on_machine: bool,
        stop: StopSignal,
        *,
        threads: bool = False,
        settings: Config | None = None,
        progress: Path | None = None,
        machine: int = 0,
        watch: RunWatch | None = None,
        in_group: GroupPlace | None = None,
    ) -> None:
        self.device = device
        self.watch = watch or RunWatch()
        self.place = self.watch.place
        self.stop = stop
        self.regroups = False
        self._progress = progress
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dims, self.reader = dims, dims.reader(self.rank)
        self.folder = self.watch.folder = Path(first_named(config.job.dump_folder))
        settings = replace(settings or config, job=replace(config.job, dump_folder=str(self.folder)))
        self.config = config = with_settled_batch(replace(config, job=settings.job), dims)
        check_same_code_and_config(config)
        torch.use_deterministic_algorithms(config.training.deterministic)
        self.groups = join_groups(in_group, config, self._live_state)
        self._grouped = in_group is not None
        patience = float(config.job.comm_timeout_seconds)
        self.writing = Writing(self.folder, self._open_record, among_groups=self._grouped, patience=patience)
        tokens, self.validation_tokens = prepare_run_tokens(config, first_on_machine)
        self.batches = TokenBatches(
            tokens.train,
            seq_len=config.training.seq_len,
            global_batch_size=config.training.global_batch_size,
            local_batch_size=config.training.local_batch_size,
            dp_rank=self.reader.rank,
            dp_degree=self.reader.degree,
            seed=config.training.seed,
            weights=config.data.weights,
            packing=config.data.row_packing,
            attend_within_documents=config.data.within_documents,
        )
        if (too_long := TooLong.of(tokens.train, config.training.seq_len)).conversations:
            self._tell(str(too_long))
        newest, damaged = self._newest_checkpoint()
        self.meshes = meshes = dims.build_mesh(device.type, timedelta(seconds=group_timeout(config)))
        self.whole = whole = build_training_model(
            config, meshes, device, self.folder, tokens, is_new=newest is None, threads=threads
        )
        self.model = whole.model
        of_adapters = f", {whole.in_adapters / 1e6:,.2f} M of them in adapters" if whole.in_adapters else ""
        self._tell(
            f"{config.model.name}: {whole.num_parameters / 1e6:,.1f} M parameters{of_adapters} on "
            f"{self.world_size} ranks ({dims}), {config.training.dtype}; "
            f"run folder {self.folder}"
        )
        self.layers = list(moe_layers(self.model).values())
        self.places = moe_layer_places(self.model)
        self._collapse = CollapseMonitor([plain_name(name) for name in self.places.names], whole.top_k)
        self.gradients = GradientManager(
            self.model,
            meshes,
            reduction=config.parallelism.gradient_reduction,
            sparse=config.parallelism.sparse_replica_gradients,
            groups=self.groups,
        )
        self.pipeline = self._build_pipeline() if dims.pp > 1 else None
        dtype = torch.bfloat16 if config.training.dtype == "bfloat16" else None
        self.optimizer = build_optimizer(self.model, config.optimizer, dtype)
        materialise_optimizer_state(self.optimizer)
        self.balancer = Balancer(
            self.model, config.balance, optimizer=self.optimizer, stage=self._stage_group(), dtype=dtype
        )
        self._seed = config.training.seed + self.rank + self.world_size * self.groups.number
        torch.manual_seed(self._seed)
        self.keeper = RunKeeper(config, self.folder, self.model, self.optimizer, str(dims), machine)
        self.step = 0
        self._resumed_step: int | None = None
        self._problem: str | None = None
        self.samples = 0
        self.bad_steps = BadSteps(config.fault_tolerance, self.keeper.folder)
        self.replicas = ReplicaCheck(self.model, self.optimizer, meshes)
        if came_from := self.keeper.resume(newest, self._take_counters, damaged):
            self._resumed_step = self.step
            self._tell(f"resumed {self.folder} at {came_from}")
        mark_layers(self.model, self.place)
        check_same_model(self.model, self.step, self.samples, self.rank // (self.world_size // dims.pp))
        # Not before the run has its weights: a start that fails leaves no settings behind.
        together(lambda: self._write_settings(settings) if self.rank == 0 else None)

    def train(self) -> None:
        """Run to the last step, or to the step boundary after a stop was asked for; a checkpoint is left in both cases.

        Raises:
            TrainingStopped: where `BadSteps` or `ReplicaCheck` ask for it, or the record cannot be written.
        """
        config = self.config
        if self.step >= config.training.steps:
            self._tell(f"nothing to do: {self.step} steps are done, training.steps is {config.training.steps}")
        self.writing.begin()
        try:
            self.model.train()
            while (taken := self._take_step()) is not None:
                metrics, routes = taken
                if self.writing.is_ours and self._is_due(config.validation.interval):
                    self.place.enter("validation")
                    metrics["validation_loss"] = self._validation_loss()
                self.place.enter("record")
                record = self.writing.record
                if record is not None:
                    self._heed(record, record.write(metrics, routes, self._computed()))
                if self._progress is not None:
                    self._progress.touch()
                pauses = self._is_due(config.validation.interval) or self._is_due(config.checkpoint.interval)
                if pauses:
                    check_alike(self.groups, self._live_state)
                # A streak of bad steps must not push the last good checkpoint out.
                if self._is_well(record) and self.writing.is_ours:
                    self.place.enter("checkpoint or snapshot")
                    self.keeper.after_step(self.step, self._counters)
                # Groups that went on to the next step would take the one that is busy for lost.
                if pauses:
                    self.place.enter("other groups")
                    self.groups.settle()
            check_alike(self.groups, self._live_state)
            self._finish()
            while not self.groups.settle():
                self._begin_step()
                self._finish()
        finally:
            self.groups.close()
            self.writing.close()

    def _newest_checkpoint(self) -> tuple[int | None, CheckpointError | None]:
        """The step of the newest that is whole, if there is one; or why those that there are cannot be read."""
        try:
            newest, passed_over = newest_whole(self.folder / CHECKPOINT_FOLDER)
        except CheckpointError as error:
            if not self.config.fault_tolerance.snapshot_interval:
                raise
            return None, error
        for message in passed_over:
            self._tell(message)
        return newest, None

    def _finish(self) -> None:
        """Leave what a run leaves behind, where this group is the one that writes."""
        if not self.writing.is_ours:
            return
        self.place.enter("checkpoint")
        self.keeper.finish(self.step, self._counters)
        self.place.enter("end")
        if problem := from_first_rank(lambda: self._problem):
            raise TrainingStopped(f"{problem}. Make room, and start again with --job.dump-folder {self.folder}")
        if self.step >= self.config.training.steps and self.config.checkpoint.last_save_in_hf:
            self._export()
        if self.writing.record is not None and self.step < self.config.training.steps:
            why = "stopping for another start" if self.regroups else "stopped as asked"
            self.writing.record.say(f"{why}, at step {self.step}; start again with --job.dump-folder {self.folder}")

    def _begin_step(self) -> None:
        """Find out which groups take part in the next step; the first of them writes metrics and checkpoints."""
        before = self.groups.count
        self.place.begin(self.step + 1)
        self.place.enter("other groups")
        self.groups.begin_step()
        self.writing.take_turn(self.groups.index == 0, self.keeper.wait)
        if self.groups.count != before:
            self._tell(f"step {self.step + 1}: {self.groups.count} replica groups take part")

    def _open_record(self) -> RunRecord:
        layers, experts = len(self.places.names), self.places.num_experts
        on_gpu = self.device.type == "cuda"
        ranks = self.balancer.num_ranks
        return RunRecord(self.config, self.folder, self.step, layers, experts, num_ranks=ranks, on_gpu=on_gpu)

    def _computed(self) -> torch.Tensor | None:
        """Routes that each of the ranks that hold the experts computed in the last step, `[L, R]`."""
        return None if self.balancer.seen is None else self.balancer.seen.computed.long()

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and (self.step % interval == 0 or self.step >= self.config.training.steps)

    def _validation_loss(self) -> float | None:
        """Mean loss over the validation set; `None` where it is not finite. The same on all ranks."""
        config = self.config
        batches = partial(
            evaluation_batches,
            self.validation_tokens,
            seq_len=config.training.seq_len,
            local_batch_size=config.training.local_batch_size,
            dp_rank=self.reader.rank,
            dp_degree=self.reader.degree,
            packing=config.data.row_packing,
            attend_within_documents=config.data.within_documents,
            max_samples=config.validation.max_samples or None,
        )
        # Read once for what may be wrong with them: in the midst of it, the other ranks would wait for this one.
        together(lambda: deque(batches(), maxlen=0))
        loss = evaluate(
            self.model,
            map(self._own_section, batches()),
            self.device,
            counts=self.reader.counts_section,
            loss_of=None if self.pipeline is None else self.pipeline.evaluate,
        ).loss
        return loss if math.isfinite(loss) else None

    def _take_step(self) -> _Taken | None:
        """A step, begun anew with the groups that are left until it counts; `None` at the end of the run."""
        started, waited = time.perf_counter(), 0.0
        taken: _Taken | None = None
        while taken is None:
            self._begin_step()
            if self.step >= self.config.training.steps:
                return None
            self.place.enter("data")
            totals = self._batch_totals(*(read := self._read()))
            if totals is None:
                continue
            targets, tokens, stop = totals
            if stop:
                return None
            waited = time.perf_counter() - started
            taken = self._train_step(read[0], targets, tokens)
        metrics, routes = taken
        metrics |= self.watch.straggler_metrics()
        ranks = self.world_size * self.groups.count
        metrics |= self.whole.speed.metrics(metrics["tokens"] / (time.perf_counter() - started) / ranks)
        if self._grouped:
            metrics |= {"replica_groups": self.groups.count, "stall_seconds": waited}
        return metrics, routes

    def _train_step(self, batches: list[Batch], targets: int, tokens: int) -> _Taken | None:
        """Forward, backward and update over this rank's micro-batches.

        Returns:
            The step's metrics and its routes per layer and logical expert `[L, E]`, the same on all ranks; `None` where
            a group was lost on the way, and nothing has changed.
        """
        config = self.config.training
        sequences = self.batches.global_batch_size
        # Not a bound method where there is nothing to sum: the counts would be copied for it.
        sum_copies = self.groups.sum_ if self._grouped else None
        set_batch_totals(self.model, sequences, tokens, self._stage_group(), self.meshes.sequence, sum_copies)
        sent_before = self._traffic()
        loss = self._backward([self._own_section(batch).inputs(self.device) for batch in batches], max(targets, 1))
        self.place.enter("gradient norm")
        own_norm = self.gradients.clip(config.max_norm)
        self.place.enter("metrics")
        terms = {"loss": loss, **self._auxiliary_losses()}
        sums, norm, memory = gather_metrics(terms, own_norm, self.device, self.groups)
        traffic = self._traffic() - sent_before
        sent = traffic_metrics(traffic, self.gradients.replica_traffic, self.device, self.groups)
        load = step_load(self.model, dist.group.WORLD)
        loads_of_ranks = self.balancer.gather(load)
        self.groups.sum_(load.routes, load.dropped, loads_of_ranks)
        if not self.groups.commit():
            self._forget_step()
            return None

        self.place.enter("optimizer")
        self.step += 1
        self.samples += self.batches.global_batch_size
        rate = self.config.optimizer.lr * learning_rate_factor(self.step, config.steps, self.config.lr_scheduler)
        applies = self.bad_steps.applies(self.step, sums["loss"], norm)
        if applies:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        # The expert bias is a part of what LoRA leaves as it is.
        finish_step(self.model, update_bias=applies and not self.config.lora.rank, load=load)
        for message in self._collapse.update(load.routes.cpu()) if self.writing.record is not None else ():
            logger.warning(f"step {self.step}: {message}")
        self.optimizer.zero_grad()
        self.place.enter("migration")
        balanced, messages = self.balancer.after_step(load, loads_of_ranks)
        for message in messages:
            self._tell(f"step {self.step}: {message}")
        return {
            "step": self.step,
            **{name: value if math.isfinite(value) else None for name, value in sums.items()},
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": rate,
            **memory,
            **load_metrics(load),
            **balanced,
            **sent,
            "tokens": tokens,
            **self.bad_steps.metrics(),
        }, load.routes

    def _forget_step(self) -> None:
        self.optimizer.zero_grad()
        for layer in self.layers:
            layer.load.reset()
        self.balancer.forget_step()

    def _backward(self, batches: list[dict[str, torch.Tensor]], targets: int) -> torch.Tensor:
        """Gradients of the mean loss over `targets` of the global batch; returns this rank's share of it."""
        if self.pipeline is not None:
            self.place.enter("pipeline")
            return self.pipeline.step(batches, 1 / targets)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            self.gradients.before_backward(is_last=index == len(batches) - 1)
            self.place.enter("forward")
            share = batch_loss(self.model, **batch) / targets
            self.place.enter("backward")
            share.backward()
            loss += share.detach()
        return loss

    def _stage_group(self) -> dist.ProcessGroup | None:
        """All ranks of this pipeline stage."""
        return self.meshes.stage if self.pipeline is not None else dist.group.WORLD

    def _build_pipeline(self) -> Pipeline:
        training, parallelism = self.config.training, self.config.parallelism
        positions = training.seq_len // self.reader.sections
        if parallelism.sequence_parallel:
            positions //= parallelism.tensor_parallel_degree
        shape = (training.local_batch_size, positions, self.model.config.get_text_config().hidden_size)
        return Pipeline(
            self.model,
            self.meshes,
            self.gradients,
            batch_loss,
            Boundary(shape, getattr(torch, training.dtype), self.device),
            schedule=parallelism.pipeline_parallel_schedule,
            num_microbatches=self.batches.global_batch_size // (training.local_batch_size * self.reader.degree),
            reshards=parallelism.reshards,
        )

    def _own_section(self, batch: Batch) -> Batch:
        """What this rank computes of a batch, which it may share with others."""
        return batch.section(self.reader.section, self.reader.sections)

    def _read(self) -> tuple[list[Batch], Exception | None]:
        """This rank's part of the next step's data, or what is wrong with it."""
        try:
            return self.batches.at(self.samples, self.groups.index, self.groups.count), None
        except (DataError, OSError) as error:
            return [], error

    def _batch_totals(self, batches: list[Batch], unread: Exception | None) -> tuple[int, int, bool] | None:
        """Targets and tokens of the global batch, and whether any rank was asked to stop. The step's agreement.

        `None` where replica groups could not agree. Raises on all ranks where one has `unread`.
        """
        counted = batches if self.reader.is_first else []
        targets = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in counted)
        tokens = sum(batch.num_tokens for batch in counted)
        self.place.enter("agreement")
        regroups, stops = self.stop.regroups, self.stop.requested and not self.stop.regroups
        words = self.watch.fingerprint.words(
            step=self.step, samples=self.samples, sequences_per_step=self.batches.global_batch_size
        )
        totals = torch.tensor([targets, tokens, stops, regroups], dtype=torch.float64, device=self.device)
        own = [float(unread is not None), *words]
        sums, (any_unread, *words) = sum_everywhere(totals, self.groups, self._fingerprint, own)
        if any_unread:
            raise_together(unread)
        self.watch.fingerprint.check(words)
        if sums is None:
            return None
        all_targets, all_tokens, all_stops, all_regroups = sums
        self.regroups = all_regroups > 0 and not all_stops
        return int(all_targets), int(all_tokens), all_stops + all_regroups > 0

    def _auxiliary_losses(self) -> dict[str, torch.Tensor]:
        """This rank's terms of the auxiliary losses: mean over layers."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        of_layers = {
            name: [layer.load.losses[name].double() for layer in self.layers if name in layer.load.losses]
            for name in self.whole.auxiliary_losses
        }
        return {name: sum(values, zero) / len(self.places.names) for name, values in of_layers.items()}

    def _traffic(self) -> Traffic:
        """What this rank has sent so far for its MoE layers; at a moment when the GPU has been waited for anyway."""
        return sum((layer.dispatcher.traffic for layer in self.layers), Traffic())

    def _is_well(self, record: RunRecord | None) -> bool:
        """Whether the last step was applied; if not, do what the policy asks for."""
        try:
            message = self.bad_steps.settle(self, self._go_back)
            self.replicas.after_step(self.step, self.config.fault_tolerance.replica_check_interval, self.keeper.folder)
        except TrainingStopped:
            self.keeper.wait()
            self.keeper.clear()
            raise
        if message and record is not None:
            self._heed(record, record.rewind(self.step, message))
        return not message

    def _heed(self, record: RunRecord, problem: str | None) -> None:
        """End the run at the next step where its record cannot be written."""
        if problem is not None:
            record.say(f"stopping: {problem}")
            self.stop.requested, self._problem = True, problem

    def _go_back(self) -> int | None:
        """To the newest state that is kept; its step."""
        self.keeper.wait()
        newest, passed_over = newest_whole(self.keeper.folder)
        for message in passed_over:
            self._tell(message)
        return self.step if self.keeper.resume(newest, self._take_counters) else None

    def _counters(self) -> dict[str, Any]:
        """Where the run stands, but for tensors; `_take_counters` takes it."""
        return {
            "step": self.step,
            "samples": self.samples,
            **self.bad_steps.state(),
            "balance": self.balancer.state(),
        }

    def _take_counters(self, counters: dict[str, Any]) -> None:
        self.step, self.samples = counters["step"], counters["samples"]
        self.bad_steps.restore(counters)
        for layer in self.layers:
            if layer.router is not None:
                layer.router.steps = self.step
        if message := self.balancer.restore(counters.get("balance", {})):
            self._tell(message)

    def _export(self) -> None:
        """Leave the model in Hugging Face's format, or the adapter in PEFT's. The run is whole without it, so that a
        failure ends nothing."""
        lora, family = self.config.lora, FAMILIES[self.config.model.name]
        destination = self.folder / (ADAPTER_FOLDER if lora.rank else EXPORT_FOLDER)
        if self.step == self._resumed_step and from_first_rank(destination.exists):
            return
        dtype, note = self.config.checkpoint.export_dtype, ""
        try:
            if lora.rank:
                base = self.config.initial_weights
                save_peft_adapter(self.model, family, lora, base, destination, dtype, replace=True)
            else:
                keys = family.keys(self.model)
                export_hf(self.model, keys, self.folder / ASSETS_FOLDER, destination, dtype, replace=True)
                note = left_out(self.model, keys)
        except CheckpointError as error:
            self._tell(f"{error}; crossdock export {self.folder} DESTINATION tries again")
            return
        self._tell(f"{'adapter' if lora.rank else 'Hugging Face model'}: {destination}{note}")

    def _live_state(self) -> LiveState:
        return LiveState(self.folder, self.model, self.optimizer, self._counters, self._take_counters, self._seed)

    def _write_settings(self, settings: Config) -> None:
        with one_at_a_time(self.folder):
            write_run_settings(settings, self.folder)

    def _fingerprint(self) -> int:
        return fingerprint(self.config, self.step, self.samples, self.layers)

    def _tell(self, message: str) -> None:
        if self.rank == 0 and self.groups.index == 0:
            say(message)
