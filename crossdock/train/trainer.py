"""The training loop."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F

from crossdock.checkpoint import Checkpointer, latest_step
from crossdock.comm import raise_together
from crossdock.config import RUN_CONFIG_FILE, Config, to_toml
from crossdock.data import Batch, TokenBatches, Tokens, prepare_tokens
from crossdock.models import FAMILIES, build_model, count_parameters, materialise, resolve_hf_config
from crossdock.moe import finish_step, moe_layers, set_batch_totals
from crossdock.parallel import ParallelDims, clip_grad_norm_, parallelize
from crossdock.routing import max_mean_load
from crossdock.train.metrics import MetricsLog, ProgressDisplay, memory_gib, say
from crossdock.train.optimizer import build_optimizer, learning_rate_factor, materialise_optimizer_state

__all__ = ["StopSignal", "Trainer", "TrainingStopped"]

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100


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
            self.tokens.train,
            seq_len=config.training.seq_len,
            global_batch_size=self._global_batch_size(),
            local_batch_size=config.training.local_batch_size,
            dp_rank=self.rank,
            dp_degree=self.world_size,
            seed=config.training.seed,
            weights=config.data.weights,
            packing=config.data.packing,
            attend_within_documents=config.data.attend_within_documents,
        )
        self.model = self._build_model(dims)
        self.layers = list(moe_layers(self.model).values())
        self.optimizer = build_optimizer(self.model, config.optimizer)
        materialise_optimizer_state(self.optimizer)
        torch.manual_seed(config.training.seed + self.rank)
        self.checkpointer = Checkpointer(
            self.folder / "checkpoint", self.model, self.optimizer, config.checkpoint.keep_latest_k
        )
        self.step = 0
        self._resumed_step: int | None = None
        self.samples = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._resume()

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
        log = _together(lambda: MetricsLog(path, self.step) if self.rank == 0 else None)
        display = ProgressDisplay(config.training.steps, self.step, config.metrics.log_freq) if self.rank == 0 else None
        try:
            self.model.train()
            saved = self._resumed_step
            while self.step < config.training.steps:
                started = time.perf_counter()
                batches = self.batches.at(self.samples)
                targets, tokens, stop = self._batch_totals(batches)
                if stop:
                    break
                metrics = self._train_step(batches, targets, tokens)
                metrics["tokens_per_second_per_gpu"] = tokens / (time.perf_counter() - started) / self.world_size
                if display is not None:
                    display.update(metrics)
                    try:
                        log.write(metrics)
                    except OSError as error:
                        display.say(f"stopping: cannot write {path}: {error}")
                        self.stop.requested = True
                self._stop_after_bad_steps()
                interval = config.checkpoint.interval
                # A streak of bad steps must not push the last good checkpoint out.
                if interval and self.step % interval == 0 and not self.skipped_in_a_row:
                    saved = self._save()
            if saved != self.step:
                self._save()
            if display is not None and self.step < config.training.steps:
                display.say(f"stopped as asked, at step {self.step}; start again with --job.dump-folder {self.folder}")
        finally:
            if display is not None:
                display.close()
                log.close()
                lock.close()

    def _train_step(self, batches: list[Batch], targets: int, tokens: int) -> dict[str, Any]:
        """Forward, backward and update over this rank's micro-batches; the step's metrics, the same on all ranks."""
        config = self.config.training
        set_batch_totals(self.model, self.batches.global_batch_size, tokens)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            logits = self.model(input_ids=batch.input_ids.to(self.device), use_cache=False).logits
            batch_loss = token_loss(logits, batch.labels.to(self.device)) / max(targets, 1)
            batch_loss.backward()
            loss += batch_loss.detach()
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
            "memory_gib": memory,
            "max_mean_load": max_mean_load(counts).max().item(),
            "tokens": tokens,
            "skipped_steps": self.skipped_steps,
        }

    def _batch_totals(self, batches: list[Batch]) -> tuple[int, int, bool]:
        """Targets and tokens of the global batch, and whether any rank was asked to stop. The step's agreement."""
        targets = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
        tokens = sum(batch.input_ids.numel() for batch in batches)
        totals = torch.tensor([targets, tokens, float(self.stop.requested)], dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        all_targets, all_tokens, stops = totals.tolist()
        return int(all_targets), int(all_tokens), stops > 0

    def _gather_metrics(self, loss: torch.Tensor) -> tuple[dict[str, float], float]:
        """Loss and auxiliary losses (mean over layers) summed over the ranks, and the largest memory of a rank."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        auxiliary = {
            name: sum((layer.load.losses[name].double() for layer in self.layers if name in layer.load.losses), zero)
            for name in self.layers[0].coefficients.active()
        }
        own = torch.stack(
            [loss, *(value / len(self.layers) for value in auxiliary.values()), zero + memory_gib(self.device)]
        )
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyone, own)
        gathered = torch.stack(everyone)
        values = gathered[:, :-1].sum(dim=0).tolist()
        return dict(zip(["loss", *auxiliary], values, strict=True)), gathered[:, -1].max().item()

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

    def _resume(self) -> None:
        newest = _from_first_rank(_together(lambda: latest_step(self.checkpointer.folder) if self.rank == 0 else None))
        if newest is not None:
            counters = self.checkpointer.load(newest)
            self.step, self.samples = counters["step"], counters["samples"]
            self.skipped_steps = counters["skipped_steps"]
            self._resumed_step = self.step
            self._tell(f"resumed {self.folder} at step {self.step}")

    def _global_batch_size(self) -> int:
        training = self.config.training
        if training.global_batch_size != -1:
            return training.global_batch_size
        return training.local_batch_size * self.world_size

    def _prepare_tokens(self) -> Tokens:
        """One rank per machine tokenises (or finds) the data while the others wait; rank 0 lays out the run folder."""
        assets = self.config.model.hf_assets_path

        def prepare() -> Tokens:
            vocabulary = resolve_hf_config(self.config.model).get_text_config().vocab_size or 0
            tokens = prepare_tokens(self.config.data, Path(assets) if assets else None, min(vocabulary, 8192))
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

    def _write_run_folder(self, tokens: Tokens) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        resolved = dataclasses.replace(
            self.config, job=dataclasses.replace(self.config.job, dump_folder=str(self.folder))
        )
        beside = self.folder / f".{RUN_CONFIG_FILE}.partial"
        beside.write_text(to_toml(resolved))
        beside.rename(self.folder / RUN_CONFIG_FILE)
        shutil.copyfile(tokens.tokenizer_path, self.folder / "tokenizer.json")

    def _build_model(self, dims: ParallelDims) -> torch.nn.Module:
        config = self.config
        family = FAMILIES[config.model.name]
        hf_config = resolve_hf_config(config.model)
        dtype = torch.float64 if config.training.dtype == "float64" else torch.float32
        model = build_model(
            family, hf_config, config.moe, dtype, force_load_balance=config.training.debug_moe_force_load_balance
        )
        parallelize(
            model,
            dims.build_mesh(self.device.type, timedelta(seconds=config.job.comm_timeout_seconds)),
            activation_checkpoint=config.activation_checkpoint,
            param_dtype=torch.bfloat16 if config.training.dtype == "bfloat16" else None,
            reshard_after_forward=config.parallelism.reshard_after_forward,
        )
        materialise(family, model, self.device, config.training.seed, hf_config.initializer_range)
        parameters = count_parameters(model)
        self._tell(
            f"{family.name}: {parameters / 1e6:,.1f} M parameters on {self.world_size} ranks "
            f"(ep {dims.ep}, ep_shard {dims.ep_shard}), {config.training.dtype}; run folder {self.folder}"
        )
        return model

    def _tell(self, message: str) -> None:
        if self.rank == 0:
            say(message)


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of `logits` `[B, S, V]` at `labels` `[B, S]`, `-100` left out; in at least fp32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


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
