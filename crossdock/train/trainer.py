"""The training loop."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import math
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from crossdock.checkpoint import (
    CHECKPOINT_FOLDER,
    Checkpointer,
    CheckpointError,
    HFCheckpoint,
    find_checkpoint,
    latest_step,
)
from crossdock.comm import raise_together
from crossdock.config import ASSETS_FOLDER, RUN_CONFIG_FILE, Config, to_toml
from crossdock.models import (
    FAMILIES,
    IGNORED_LABEL,
    batch_loss,
    build_model,
    count_parameters,
    export_hf,
    materialise,
    resolve_hf_config,
    write_assets,
)
from crossdock.moe import finish_step, moe_layers, set_batch_totals
from crossdock.parallel import ParallelDims, clip_grad_norm_, parallelize
from crossdock.routing import max_mean_load
from crossdock.tools.report import LOAD_FILE, LoadLog, write_report
from crossdock.train.data import Batch, TokenBatches, TokenFile, prepare_tokens
from crossdock.train.flops import Speed
from crossdock.train.metrics import MetricsLog, ProgressDisplay, memory_use, say
from crossdock.train.optimizer import build_optimizer, learning_rate_factor, materialise_optimizer_state
from crossdock.train.trackers import Trackers

__all__ = ["StopSignal", "Trainer", "TrainingStopped"]

logger = logging.getLogger(__name__)

EXPORT_FOLDER = "hf"


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class StopSignal:
    """Remembers that SIGTERM or Ctrl-C asked for an end, until the next step boundary."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True


class Trainer:
    """One rank of a training run. Needs the default process group; every method is collective.

    Args:
        config: validated, with `job.dump_folder` set on one rank at least.
        dims: the layout.
        device: of this rank.
        first_on_machine: this rank prepares the data for the others of its machine.
        stop: asks for an early end.
    """

    def __init__(
        self, config: Config, dims: ParallelDims, device: torch.device, first_on_machine: bool, stop: StopSignal
    ) -> None:
        self.config = config
        self.device = device
        self.first_on_machine = first_on_machine
        self.stop = stop
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.folder = Path(_first_named(config.job.dump_folder))
        self.tokens = self._prepare_tokens()
        self.batches = TokenBatches(
            self.tokens,
            seq_len=config.training.seq_len,
            global_batch_size=self._global_batch_size(),
            local_batch_size=config.training.local_batch_size,
            dp_rank=self.rank,
            dp_degree=self.world_size,
            seed=config.training.seed,
        )
        newest = _from_first_rank(
            _together(lambda: latest_step(self.folder / CHECKPOINT_FOLDER) if self.rank == 0 else None)
        )
        self.model = self._build_model(dims, is_new=newest is None)
        self.layers = list(moe_layers(self.model).values())
        self.speed = Speed.of(self.model, config.training.seq_len, device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        materialise_optimizer_state(self.optimizer)
        torch.manual_seed(config.training.seed + self.rank)
        self.checkpointer = Checkpointer(
            self.folder / CHECKPOINT_FOLDER, self.model, self.optimizer, config.checkpoint.keep_latest_k
        )
        self.step = 0
        self._resumed_step: int | None = None
        self.samples = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        if newest is not None:
            self._resume(newest)

    def train(self) -> None:
        """Run to the last step, or to the step boundary after a stop was asked for; a checkpoint is left in both cases.

        Raises:
            TrainingStopped: after `training.max_skipped_steps` bad steps in a row.
        """
        config = self.config
        if self.step >= config.training.steps:
            self._tell(f"nothing to do: {self.step} steps are done, training.steps is {config.training.steps}")
        lock = _together(lambda: _lock(self.folder) if self.rank == 0 else None)
        path = self.folder / "metrics.jsonl"
        trackers = _together(lambda: Trackers(config, self.folder, self.step) if self.rank == 0 else None)
        log = _together(lambda: MetricsLog(path, self.step) if self.rank == 0 else None)
        loads = _together(self._load_log)
        display = None
        if self.rank == 0:
            freq, on_gpu = config.metrics.log_freq, self.device.type == "cuda"
            display = ProgressDisplay(config.training.steps, self.step, freq, on_gpu=on_gpu)
        try:
            self.model.train()
            saved = self._resumed_step
            while self.step < config.training.steps:
                started = time.perf_counter()
                batches = self.batches.at(self.samples)
                targets, tokens, stop = self._batch_totals(batches)
                if stop:
                    break
                metrics, counts = self._train_step(batches, targets, tokens)
                metrics |= self.speed.metrics(tokens / (time.perf_counter() - started) / self.world_size)
                if display is not None:
                    display.update(metrics)
                    try:
                        log.write(metrics)
                        if loads is not None and self.step % config.metrics.load_interval == 0:
                            loads.write(self.step, counts)
                    except OSError as error:
                        display.say(f"stopping: cannot write below {self.folder}: {error}")
                        self.stop.requested = True
                    trackers.log(metrics)
                self._stop_after_bad_steps()
                interval = config.checkpoint.interval
                # A streak of bad steps must not push the last good checkpoint out.
                if interval and self.step % interval == 0 and not self.skipped_in_a_row:
                    saved = self._save()
            if saved != self.step:
                self._save()
            if self.step >= config.training.steps and config.checkpoint.last_save_in_hf:
                self._export()
            if display is not None and self.step < config.training.steps:
                display.say(f"stopped as asked, at step {self.step}; start again with --job.dump-folder {self.folder}")
        finally:
            if display is not None:
                display.close()
                trackers.close()
                log.close()
                if loads is not None:
                    loads.close()
                self._write_report()
                lock.close()

    def _load_log(self) -> LoadLog | None:
        if self.rank != 0 or not self.config.metrics.load_interval:
            return None
        experts = self.layers[0].router.config.num_experts
        return LoadLog(self.folder / LOAD_FILE, len(self.layers), experts, self.step)

    def _write_report(self) -> None:
        try:
            say(f"report: {write_report(self.folder)}")
        except Exception as error:  # noqa: BLE001 (whatever is wrong with it, a report is not worth a run)
            say(f"no report: {error}")

    def _train_step(self, batches: list[Batch], targets: int, tokens: int) -> tuple[dict[str, Any], torch.Tensor]:
        """Forward, backward and update over this rank's micro-batches.

        Returns:
            The step's metrics and its routes per layer and logical expert `[L, E]`, the same on all ranks.
        """
        config = self.config.training
        set_batch_totals(self.model, self.batches.global_batch_size, tokens)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            summed = batch_loss(self.model, batch.input_ids.to(self.device), batch.labels.to(self.device))
            share = summed / max(targets, 1)
            share.backward()
            loss += share.detach()
        norm = clip_grad_norm_(self.model.parameters(), config.max_norm).item()
        sums, memory = self._gather_metrics(loss)

        self.step += 1
        self.samples += self.batches.global_batch_size
        rate = self.config.optimizer.lr * learning_rate_factor(self.step, config.steps, self.config.lr_scheduler)
        finite = math.isfinite(sums["loss"]) and math.isfinite(norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        counts = finish_step(self.model, dist.group.WORLD, update_bias=finite)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped_steps += not finite
        self.optimizer.zero_grad()
        return {
            "step": self.step,
            **{name: value if math.isfinite(value) else None for name, value in sums.items()},
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": rate,
            **memory,
            "max_mean_load": max_mean_load(counts).max().item(),
            "tokens": tokens,
            "skipped_steps": self.skipped_steps,
        }, counts

    def _batch_totals(self, batches: list[Batch]) -> tuple[int, int, bool]:
        """Targets and tokens of the global batch, and whether any rank was asked to stop. The step's agreement."""
        targets = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
        tokens = sum(batch.input_ids.numel() for batch in batches)
        totals = torch.tensor([targets, tokens, float(self.stop.requested)], dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        all_targets, all_tokens, stops = totals.tolist()
        return int(all_targets), int(all_tokens), stops > 0

    def _gather_metrics(self, loss: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """Loss and auxiliary losses (mean over layers) summed over the ranks, and the largest memory of a rank."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        auxiliary = {
            name: sum((layer.load.losses[name].double() for layer in self.layers if name in layer.load.losses), zero)
            for name in self.layers[0].coefficients.active()
        }
        memory = [zero + value for value in memory_use(self.device)]
        own = torch.stack([loss, *(value / len(self.layers) for value in auxiliary.values()), *memory])
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyone, own)
        gathered = torch.stack(everyone)
        values, largest = gathered[:, :-2].sum(dim=0).tolist(), gathered[:, -2:].amax(dim=0).tolist()
        sums = dict(zip(["loss", *auxiliary], values, strict=True))
        return sums, dict(zip(["memory_gib", "memory_percent"], largest, strict=True))

    def _stop_after_bad_steps(self) -> None:
        if self.skipped_in_a_row >= self.config.training.max_skipped_steps:
            raise TrainingStopped(
                f"{self.skipped_in_a_row} steps in a row, the last of them {self.step}, had a NaN or infinite loss or "
                "gradient norm and were skipped. Lower optimizer.lr, lengthen lr_scheduler.warmup_steps, or go back: "
                f"remove the newest folders of {self.checkpointer.folder} and start again. training.max_skipped_steps "
                "sets how many are allowed."
            )

    def _save(self) -> int:
        counters = {
            "step": self.step,
            "samples": self.samples,
            "skipped_steps": self.skipped_steps,
        }
        self.checkpointer.save(self.step, counters)
        return self.step

    def _resume(self, newest: int) -> None:
        counters = self.checkpointer.load(newest)
        self.step, self.samples = counters["step"], counters["samples"]
        self.skipped_steps = counters["skipped_steps"]
        self._resumed_step = self.step
        self._tell(f"resumed {self.folder} at step {self.step}")

    def _export(self) -> None:
        """Leave the model in Hugging Face's format. The run is whole without it, so that a failure ends nothing."""
        destination = self.folder / EXPORT_FOLDER
        keys = FAMILIES[self.config.model.name].hf_keys
        dtype = self.config.checkpoint.export_dtype
        try:
            export_hf(self.model, keys, self.folder / ASSETS_FOLDER, destination, dtype, replace=True)
        except CheckpointError as error:
            self._tell(f"{error}; crossdock export {self.folder} DESTINATION tries again")
            return
        biased = any(layer.router.expert_bias is not None for layer in self.layers)
        self._tell(f"Hugging Face model: {destination}{' (its format has no expert bias)' if biased else ''}")

    def _global_batch_size(self) -> int:
        training = self.config.training
        if training.global_batch_size != -1:
            return training.global_batch_size
        return training.local_batch_size * self.world_size

    def _prepare_tokens(self) -> TokenFile:
        """One rank per machine tokenises (or finds) the data while the others wait; rank 0 lays out the run folder."""
        assets = self.config.model.hf_assets_path
        cache = Path(self.config.data.cache_folder).expanduser()

        def prepare() -> TokenFile:
            vocabulary = resolve_hf_config(self.config.model).get_text_config().vocab_size or 0
            tokens = prepare_tokens(
                self.config.data.source, Path(assets) if assets else None, cache, min(vocabulary, 8192)
            )
            if tokens.vocab_size > vocabulary:
                raise TrainingStopped(
                    f"the tokenizer has {tokens.vocab_size} tokens, the model's vocabulary {vocabulary}; "
                    "choose another model.flavor or model.hf_assets_path"
                )
            return tokens

        prepared = _together(prepare if self.first_on_machine else lambda: None)
        tokens = _together(lambda: prepared or prepare())
        _together(lambda: self._write_run_folder(tokens) if self.rank == 0 else None)
        return tokens

    def _write_run_folder(self, tokens: TokenFile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        resolved = dataclasses.replace(
            self.config, job=dataclasses.replace(self.config.job, dump_folder=str(self.folder))
        )
        beside = self.folder / f".{RUN_CONFIG_FILE}.partial"
        beside.write_text(to_toml(resolved))
        beside.rename(self.folder / RUN_CONFIG_FILE)

    def _build_model(self, dims: ParallelDims, is_new: bool) -> PreTrainedModel:
        """The model on its layout, with its first values where the run `is_new`: drawn, or those it starts from."""
        config = self.config
        family = FAMILIES[config.model.name]
        model = build_model(
            family,
            resolve_hf_config(config.model),
            config.moe,
            torch.float64 if config.training.dtype == "float64" else torch.float32,
            attn_implementation=config.model.attn_implementation,
            kernels=config.model.kernels,
            force_load_balance=config.training.debug_moe_force_load_balance,
        )
        for layer in moe_layers(model).values():
            layer.router.requires_grad_(not config.training.freeze_router)
            layer.experts.requires_grad_(not config.training.freeze_experts)
        start = Path(config.initial_weights) if is_new and config.initial_weights else None
        checkpoint = find_checkpoint(start) if start is not None else None
        weights = None
        if start is not None and checkpoint is None:
            weights = _together(lambda: HFCheckpoint.open(start))
        if is_new:
            _together(lambda: self._write_assets(model, weights) if self.rank == 0 else None)
        parallelize(
            model,
            dims.build_mesh(self.device.type, timedelta(seconds=config.job.comm_timeout_seconds)),
            activation_checkpoint=config.activation_checkpoint,
            compile_config=config.compile,
            param_dtype=torch.bfloat16 if config.training.dtype == "bfloat16" else None,
            reshard_after_forward=config.parallelism.reshard_after_forward,
            cpu_offload=config.training.enable_cpu_offload,
        )
        offload = config.training.enable_cpu_offload
        materialise(family, model, self.device, offload=offload, seed=config.training.seed, weights=weights)
        if checkpoint is not None:
            Checkpointer(checkpoint[0], model, None).load(checkpoint[1])
        parameters = count_parameters(model)
        self._tell(
            f"{family.name}: {parameters / 1e6:,.1f} M parameters on {self.world_size} ranks "
            f"(ep {dims.ep}, ep_shard {dims.ep_shard}), {config.training.dtype}; run folder {self.folder}"
        )
        return model

    def _write_assets(self, model: PreTrainedModel, weights: HFCheckpoint | None) -> None:
        tokens = self.tokens
        source = Path(self.config.model.hf_assets_path) if self.config.model.hf_assets_path else None
        folder = self.folder / ASSETS_FOLDER
        write_assets(folder, model, tokens.tokenizer_path, tokens.end_of_text_id, source, weights)

    def _tell(self, message: str) -> None:
        if self.rank == 0:
            say(message)


def _from_first_rank(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _first_named(folder: str) -> str:
    """The folder that the first rank with one names."""
    folders: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(folders, folder)
    return next(name for name in folders if name)


def _lock(folder: Path) -> TextIO:
    """Hold the run folder until the file is closed, so that no other run writes there."""
    file = open(folder / ".lock", "w")  # noqa: SIM115 (open for the whole run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise TrainingStopped(f"job.dump_folder {folder} is in use by another run") from None
    return file


def _together(action: Callable[[], Any]) -> Any:
    """Run `action`; if it fails on any rank, raise on all."""
    error: Exception | None = None
    result = None
    try:
        result = action()
    except OSError as caught:
        error = TrainingStopped(str(caught))
    except Exception as caught:  # noqa: BLE001 (whatever it is, the others must hear of it)
        error = caught
    raise_together(error)
    return result
