"""Checkpoints for transformers' `Trainer`, which cannot resume a model that was sharded at load."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from crossdock.checkpoint import Checkpointer, CheckpointError, materialise_optimizer_state, newest_whole, read_counters

__all__ = ["CheckpointCallback"]

logger = logging.getLogger(__name__)


class CheckpointCallback(TrainerCallback):
    """Saves and resumes weights, optimizer, scheduler, torch's random state and the position in the data.

        checkpoints = CheckpointCallback("runs/checkpoints", save_steps=100)
        trainer = Trainer(model, TrainingArguments(..., save_strategy="no"), ..., callbacks=[checkpoints])
        trainer.train(resume_from_checkpoint=checkpoints.resume_folder())

    Checkpoints are `crossdock.checkpoint`'s: safetensors, written by all ranks, loaded on any number of them. The
    position is the Trainer's own count of steps, which it skips on resuming: `resume_folder` hands it that alone, in a
    temporary folder, and this callback loads the rest. On another number of ranks, choose a batch size per device that
    keeps the global batch; the random state then starts anew. States of other callbacks, and random states of Python
    and numpy, are not saved.

    Args:
        folder: of the run's checkpoints; all ranks see the same one.
        save_steps: optimizer steps between checkpoints; the last step is always saved. 0 saves the last alone.
        keep_latest_k: how many checkpoints are kept; 0 keeps all.
    """

    def __init__(self, folder: str | Path, *, save_steps: int = 500, keep_latest_k: int = 2) -> None:
        for name, value in {"save_steps": save_steps, "keep_latest_k": keep_latest_k}.items():
            if value < 0:
                raise ValueError(f"CheckpointCallback: {name} = {value}; valid: 0 or more")
        self.folder = Path(folder)
        self.save_steps = save_steps
        self.keep_latest_k = keep_latest_k
        self._handed_over: tempfile.TemporaryDirectory[str] | None = None
        self._checkpointer: Checkpointer | None = None
        self._random: _RandomState | None = None
        self._saved_step: int | None = None

    def resume_folder(self) -> str | None:
        """What `Trainer.train(resume_from_checkpoint=...)` takes: the newest checkpoint's, `None` if there is none.

        Collective where a default process group exists. The folder is temporary and of use with this callback alone.

        Raises:
            CheckpointError: on all ranks, if there are checkpoints and none is whole.
        """
        step, passed_over = newest_whole(self.folder)
        for message in passed_over:
            logger.warning(message)
        if step is None:
            return None
        counters = read_counters(self.folder, step)
        self._handed_over = tempfile.TemporaryDirectory(prefix="crossdock-resume-")
        folder = Path(self._handed_over.name)
        (folder / TRAINER_STATE_NAME).write_text(json.dumps(counters["trainer_state"]))
        # The Trainer insists on weights and warns of those that are missing: an index of all, whose file holds none.
        save_file({}, folder / "none.safetensors", metadata={"format": "pt"})
        weight_map = dict.fromkeys(counters["weight_names"], "none.safetensors")
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return str(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        # Accelerate wraps it.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._checkpointer = Checkpointer(self.folder, model, optimizer, self.keep_latest_k)
        self._saved_step = state.global_step
        handed_over, self._handed_over = self._handed_over, None
        if handed_over is None:
            return
        handed_over.cleanup()
        step = state.global_step
        counters = read_counters(self.folder, step)
        materialise_optimizer_state(optimizer)
        for name, parameter in model.named_parameters():
            if name in counters["without_optimizer_state"]:
                optimizer.state.pop(parameter, None)
        self._checkpointer.load(step)
        _load_scheduler(kwargs["lr_scheduler"], optimizer, counters["scheduler"], self.folder)
        if counters["world_size"] == _world_size():
            # Within an epoch, the Trainer draws random numbers to get at the next batch, which the run had drawn.
            inside_epoch = not float(counters["trainer_state"]["epoch"] or 0).is_integer() and not args.ignore_data_skip
            self._random = _RandomState.current(model, inside_epoch)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._random is not None and not self._random.inside_epoch:
            self._restore_random()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._random is not None:
            self._restore_random()
        # Not at the step's end: the Trainer logs and evaluates after that.
        self._save_if_due(state, kwargs["lr_scheduler"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._save_if_due(state, kwargs["lr_scheduler"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._save_if_due(state, kwargs["lr_scheduler"], last=True)
        self._checkpointer = None

    def _restore_random(self) -> None:
        assert self._random is not None
        self._random.restore()
        self._random = None

    def _save_if_due(self, state: TrainerState, scheduler: Any, last: bool = False) -> None:
        checkpointer, step = self._checkpointer, state.global_step
        due = last or (self.save_steps > 0 and step % self.save_steps == 0)
        if checkpointer is None or not due or step == self._saved_step:
            return
        assert checkpointer.optimizer is not None
        counters = {
            "world_size": _world_size(),
            "trainer_state": dataclasses.asdict(state),
            "scheduler": _scheduler_state(scheduler),
            "without_optimizer_state": _without_state(checkpointer.optimizer, checkpointer.model),
            "weight_names": list(checkpointer.model.state_dict()),
        }
        checkpointer.save(step, counters)
        self._saved_step = step


@dataclasses.dataclass(frozen=True)
class _RandomState:
    """torch's random state, to be restored once the run is where it was when that was saved."""

    cpu: Tensor
    cuda: Tensor | None
    inside_epoch: bool

    @classmethod
    def current(cls, model: nn.Module, inside_epoch: bool) -> _RandomState:
        on_gpu = any(parameter.is_cuda for parameter in model.parameters())
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None, inside_epoch)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def _without_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of trained parameters that have no optimizer state.

    Raises:
        CheckpointError: if a state is no tensor, which a checkpoint does not hold.
    """
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key!r} as {type(value).__name__}; only optimizers whose state "
                    "is tensors can be saved, such as AdamW"
                )
    return [name for name, parameter in model.named_parameters() if not optimizer.state.get(parameter)]


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    state = scheduler.state_dict()
    try:
        # What JSON makes of it, to be the same in memory and on disk.
        return json.loads(json.dumps(state))
    except TypeError as error:
        raise CheckpointError(f"the state of {type(scheduler).__name__} cannot be saved: {error}") from None


def _load_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any], folder: Path) -> None:
    """Restore `scheduler` and the learning rates that it had set.

    The Trainer makes a group of parameters for each mesh, so their number differs between layouts.
    """
    groups = len(optimizer.param_groups)
    for name, value in state.items():
        current = scheduler.state_dict().get(name)
        if not isinstance(value, list) or not isinstance(current, list) or len(current) != groups:
            continue
        if len(value) != groups and any(entry != value[0] for entry in value):
            raise CheckpointError(
                f"checkpoint in {folder}: the scheduler's {name} has {len(value)} different entries, but the optimizer "
                f"has {groups} groups of parameters on this layout"
            )
        if len(value) != groups:
            state = state | {name: value[:1] * groups}
    scheduler.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
