"""transformers' `Trainer` on this rank's process group, as it runs under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from tests.integrations.tiny_models import full, load, token_ids

__all__ = ["Sequences", "StopAt", "distance", "launched", "train"]

# The learning rate must show a wrong step of the schedule.
_ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "max_steps": 6,
}


class Sequences(Dataset[dict[str, Any]]):
    def __init__(self, number: int) -> None:
        self.ids = token_ids(7, batch=number)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class StopAt(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


@contextmanager
def launched() -> Iterator[None]:
    """The environment of torchrun; accelerate, which keeps what it read of it, forgets afterwards."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    if world_size > 1:
        os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()


def train(
    folder: str,
    output: str,
    layout: dict[str, Any] | None,
    callbacks: Callable[[], list[TrainerCallback]],
    *,
    resume: bool = False,
    sequences: int = 10,
    **arguments: Any,
) -> dict[str, Any]:
    """Train the model of `folder` with transformers' Trainer.

    Args:
        callbacks: makes them; the first has `resume_folder` where `resume` is true.

    Returns:
        `losses` and `norms` by step, `rates`, `epoch`, and the full `weights` at the end.
    """
    import crossdock.integrations.transformers  # noqa: F401 (registers)

    with launched():
        model: PreTrainedModel = load(folder, layout, "crossdock")
        made: list[Any] = callbacks()
        settings = TrainingArguments(output_dir=str(Path(output)), **(_ARGUMENTS | arguments))
        trainer = Trainer(model, settings, train_dataset=Sequences(sequences), callbacks=made)
        trainer.train(resume_from_checkpoint=made[0].resume_folder() if resume else None)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "losses": {entry["step"]: entry["loss"] for entry in logs},
            "norms": {entry["step"]: float(entry["grad_norm"]) for entry in logs},
            "rates": {entry["step"]: entry["learning_rate"] for entry in logs},
            "epoch": trainer.state.epoch,
            "weights": {name: full(parameter) for name, parameter in model.named_parameters()},
        }


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest distance of two tensors of a name, relative to the second's norm."""
    assert a.keys() == b.keys()
    return max(float(np.linalg.norm(a[name] - b[name]) / (np.linalg.norm(b[name]) + 1e-30)) for name in b)
