"""The training loop."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crossdock.checkpoint import CHECKPOINT_FOLDER, newest_whole
from crossdock.comm import raise_together
from crossdock.config import Config, with_settled_batch, write_run_settings
from crossdock.data import IGNORED_LABEL, Batch, DataError, TokenBatches, TooLong
from crossdock.moe import moe_layer_places, moe_layers
from crossdock.parallel import GroupPlace, ParallelDims, plain_name
from crossdock.routing import CollapseMonitor
from crossdock.train.bad_steps import BadSteps
from crossdock.train.drift import ReplicaCheck
from crossdock.train.exporting import leave_export
from crossdock.train.fingerprints import check_same_code_and_config, check_same_model, hash_of_run
from crossdock.train.host_memory import GIVE_BACK_INTERVAL, give_back_memory
from crossdock.train.keeping import RunKeeper, newest_checkpoint
from crossdock.train.layer_marks import mark_layers
from crossdock.train.live import LiveState, check_alike, fingerprint, join_groups, sum_everywhere
from crossdock.train.metrics import say
from crossdock.train.preparing import build_training_model, prepare_run_tokens
from crossdock.train.profiling import StepProfiler
from crossdock.train.progress import Progress
from crossdock.train.record import RunRecord, one_at_a_time
from crossdock.train.stepping import Stepper, Taken
from crossdock.train.stopping import StopSignal
from crossdock.train.times import step_times
from crossdock.train.together import TrainingStopped, any_rank, first_named, from_first_rank, together
from crossdock.train.validation import validation_loss
from crossdock.train.watching import RunWatch, group_timeout
from crossdock.train.writing import Writing

__all__ = ["Trainer", "TrainingStopped"]

logger = logging.getLogger(__name__)

_MOST_TRIES = 10  # Of a step, each with the replica groups that are left.


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
        progress: told of every step that is done.
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
        progress: Progress | None = None,
        machine: int = 0,
        watch: RunWatch | None = None,
        in_group: GroupPlace | None = None,
    ) -> None:
        self.device = device
        self.watch = watch or RunWatch()
        self.place = self.watch.place
        self.stop, self.regroups = stop, False
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
        self._run_hash = hash_of_run(config) if self._grouped else ""
        self.writing = Writing(self.folder, self._open_record, among_groups=self._grouped)
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
        has_snapshots = config.fault_tolerance.snapshot_interval > 0
        newest, damaged = newest_checkpoint(self.folder / CHECKPOINT_FOLDER, has_snapshots, self._tell)
        self.meshes = meshes = dims.build_mesh(device.type, timedelta(seconds=group_timeout(config)))
        self.whole = whole = build_training_model(
            config, meshes, device, self.folder, tokens, is_new=newest is None, threads=threads
        )
        self.model = whole.model
        of_adapters = f", {whole.in_adapters / 1e6:,.2f} M of them in adapters" if whole.in_adapters else ""
        self._tell(
            f"{config.model.name}: {whole.num_parameters / 1e6:,.1f} M parameters{of_adapters} on "
            f"{self.world_size} ranks ({dims}), {config.training.dtype}; run folder {self.folder}"
        )
        self.layers = list(moe_layers(self.model).values())
        self.places = moe_layer_places(self.model)
        self._collapse = CollapseMonitor([plain_name(name) for name in self.places.names], whole.top_k)
        self.bad_steps = BadSteps(config.fault_tolerance, self.folder / CHECKPOINT_FOLDER)
        self.stepper = Stepper(
            config,
            whole,
            meshes,
            self.reader,
            device=device,
            place=self.place,
            groups=self.groups,
            bad_steps=self.bad_steps,
        )
        self.optimizer, self.balancer = self.stepper.optimizer, self.stepper.balancer
        self._seed = config.training.seed + self.rank + self.world_size * self.groups.number
        torch.manual_seed(self._seed)
        self.keeper = RunKeeper(config, self.folder, self.model, self.optimizer, str(dims), machine)
        self.step = self.samples = 0
        self._resumed_step: int | None = None
        self._problem: str | None = None
        self.replicas = ReplicaCheck(self.model, self.optimizer, meshes)
        if came_from := self.keeper.resume(newest, self._take_counters, damaged):
            self._resumed_step = self.step
            self._tell(f"resumed {self.folder} at {came_from}")
        self._start = f"goes on at {came_from}" if came_from else "a new run"  # told once, when the record is opened
        mark_layers(self.model, self.place)
        self.profiler = StepProfiler(config.profiling, self.folder, self.place, self.rank, device)
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
                metrics, routes, _ = taken
                if self.writing.is_ours and self._is_due(config.validation.interval):
                    self.place.enter("validation")
                    metrics["validation_loss"] = self._validation_loss()
                self.place.enter("record")
                record = self.writing.record
                if record is not None:
                    self._heed(record, record.write(metrics, routes, self._computed()))
                if self._progress is not None:
                    self._progress.done(self.step)
                pauses = self._is_due(config.validation.interval) or self._is_due(config.checkpoint.interval)
                if pauses:
                    check_alike(self.groups, self._live_state)
                # A streak of bad steps must not push the last good checkpoint out.
                if self._is_well(record) and self.writing.is_ours:
                    self.place.enter("checkpoint or snapshot")
                    self.keeper.after_step(self.step, self._counters)
                if self.step % GIVE_BACK_INTERVAL == 0:
                    give_back_memory()
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
            self.profiler.close()
            self.groups.close()
            self.writing.close()

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
            again = self.step != self._resumed_step
            self._tell(leave_export(self.config, self.folder, self.model, again=again))
        if self.writing.record is not None and self.step < self.config.training.steps:
            why = "stopping for another start" if self.regroups else "stopped as asked"
            self.writing.record.note("stop", why)
            self.writing.record.say(f"{why}, at step {self.step}; start again with --job.dump-folder {self.folder}")

    def _begin_step(self) -> bool:
        """Find out which groups take part in the next step; the first of them writes metrics and checkpoints.

        False where the run was asked to stop before there were enough: this group writes then.
        """
        before, waited = self.groups.count, False
        self.place.begin(self.step + 1)
        self.place.enter("other groups")
        self.writing.let_go(is_writing=self.keeper.is_writing)
        while not self.groups.begin_step():
            if any_rank(self.stop.requested):
                self.writing.take_turn(True, self.keeper.wait)
                return False
            if not waited and self.rank == 0:
                fewest = self.config.fault_tolerance.min_replica_groups
                say(f"replica group {self.groups.number} waits before step {self.step + 1}: {fewest} must take part")
            waited = True
        self.writing.take_turn(self.groups.index == 0, self.keeper.wait)
        if self.groups.count != before:
            message = f"{self.groups.count} replica groups take part"
            self._tell(f"step {self.step + 1}: {message}")
            if self.writing.record is not None and before:
                self.writing.record.note("groups", message)
        return True

    def _open_record(self) -> RunRecord:
        layers, experts, ranks = len(self.places.names), self.places.num_experts, self.balancer.num_ranks
        on_gpu = self.device.type == "cuda"
        record = RunRecord(self.config, self.folder, self.step, layers, experts, num_ranks=ranks, on_gpu=on_gpu)
        if self._start:
            record.note("start", f"{self._start}, on {self.world_size * self.groups.count} ranks ({self.dims})")
            self._start = ""
        return record

    def _computed(self) -> torch.Tensor | None:
        """Routes that each of the ranks that hold the experts computed in the last step, `[L, R]`."""
        return None if self.balancer.seen is None else self.balancer.seen.computed.long()

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and (self.step % interval == 0 or self.step >= self.config.training.steps)

    def _validation_loss(self) -> float | None:
        pipeline, tokens = self.stepper.pipeline, self.validation_tokens
        return validation_loss(self.model, tokens, self.config, self.reader, self.device, pipeline)

    def _take_step(self) -> Taken | None:
        """A step, begun anew with the groups that are left until it counts; `None` at the end of the run."""
        started = time.perf_counter()
        self.profiler.begin(self.step + 1)
        for _ in range(_MOST_TRIES):
            if not self._begin_step() or self.step >= self.config.training.steps:
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
            if taken is not None:
                break
        else:
            raise TrainingStopped(
                f"step {self.step + 1} was begun {_MOST_TRIES} times, and no sum over the replica groups came about: "
                "they find one another, but not by the network that gloo talks over; GLOO_SOCKET_IFNAME names it"
            )
        self.profiler.end()
        metrics = taken.metrics
        metrics |= self.watch.straggler_metrics()
        ranks = self.world_size * self.groups.count
        metrics |= self.whole.speed.metrics(metrics["tokens"] / (time.perf_counter() - started) / ranks)
        metrics |= step_times(self.place.take_seconds())
        if self._grouped:
            metrics |= {"replica_groups": self.groups.count, "stall_seconds": waited}
        return taken

    def _train_step(self, batches: list[Batch], targets: int, tokens: int) -> Taken | None:
        """The next step; `None` where a group was lost on the way, and nothing has changed."""
        taken = self.stepper.take(self.step + 1, batches, targets, tokens)
        if taken is not None:
            self.step += 1
            self.samples += self.batches.global_batch_size
            for message in self._collapse.update(taken.routes.cpu()) if self.writing.record is not None else ():
                logger.warning(f"step {self.step}: {message}")
            for message in taken.messages:
                self._tell(f"step {self.step}: {message}")
        return taken

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

    def _is_well(self, record: RunRecord | None) -> bool:
        """Whether the last step was applied; if not, do what the policy asks for."""
        try:
            message = self.bad_steps.settle(self, self._go_back)
            self.replicas.after_step(self.step, self.config.fault_tolerance.replica_check_interval, self.keeper.folder)
        except TrainingStopped as stopped:
            if problem := self.keeper.close():
                raise TrainingStopped(f"{stopped}; besides, {problem}") from None
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

    def _live_state(self) -> LiveState:
        return LiveState(self.folder, self.model, self.optimizer, self._counters, self._take_counters, self._seed)

    def _write_settings(self, settings: Config) -> None:
        with one_at_a_time(self.folder):
            write_run_settings(settings, self.folder)

    def _fingerprint(self) -> int:
        return fingerprint(self._run_hash, self.step, self.samples, self.layers)

    def _tell(self, message: str) -> None:
        if message and self.rank == 0 and self.groups.index == 0:
            say(message)
