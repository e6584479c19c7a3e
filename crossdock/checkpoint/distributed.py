"""Checkpoints of a run: torch's distributed checkpoint over safetensors, by logical expert, resharding on load.

A checkpoint is a folder `step-00000020` with safetensors files, written by all ranks, and `state.json`, which holds all
that is no tensor. It is written beside its final place and renamed when whole, so that a crash leaves the previous one.
Nothing in it is executed on load.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from crossdock.checkpoint.experts import ExpertRows
from crossdock.comm import raise_together

__all__ = ["CheckpointConfig", "CheckpointError", "Checkpointer", "latest_step"]

_STATE_FILE = "state.json"
_FORMAT = 1
_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class CheckpointConfig:
    """`[checkpoint]`: when a run is saved."""

    interval: int = 500
    """Steps between checkpoints; the last step is always saved. 0 saves the last step alone."""
    keep_latest_k: int = 2
    """How many checkpoints are kept; 0 keeps all."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder and what is wrong with it."""


class Checkpointer:
    """Saves and loads one run's model, optimizer, random state and counters. All methods are collective.

    Args:
        folder: of the run's checkpoints; all ranks see the same one.
        model: on any layout.
        optimizer: its state must exist (`materialise_optimizer_state`).
        keep_latest_k: how many checkpoints are kept; 0 keeps all.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, keep_latest_k: int) -> None:
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.keep_latest_k = keep_latest_k
        self._rows = ExpertRows(model)
        self._rank = dist.get_rank()

    def save(self, step: int, counters: dict[str, Any]) -> Path:
        """Write the checkpoint of `step` with `counters` (what JSON can hold), then drop old ones.

        Raises:
            CheckpointError: on all ranks, if any of them failed; earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        self._on_first_rank(lambda: _make_empty(partial))
        tensors = self._tensors()
        tensors[f"random_state.{self._rank}"] = torch.get_rng_state()
        writer = HuggingFaceStorageWriter(
            str(partial), fqn_to_index_mapping=self._file_of_each_name(tensors), save_distributed=True
        )
        try:
            dcp.save(tensors, storage_writer=writer)
        except (CheckpointException, OSError) as error:
            raise CheckpointError(f"cannot write checkpoint {final}: {_reason(error)}") from None
        state = {
            "format": _FORMAT,
            "step": step,
            "world_size": dist.get_world_size(),
            "optimizer_step": self._optimizer_step(),
            "counters": counters,
        }
        self._on_first_rank(lambda: _finish(partial, final, state))
        self._on_first_rank(self._drop_old)
        return final

    def load(self, step: int) -> dict[str, Any]:
        """Load the checkpoint of `step` into model and optimizer, whatever layout wrote it; returns its counters.

        The random state is restored where the number of ranks is the same as when it was saved.

        Raises:
            CheckpointError: on all ranks, naming what is missing, misshapen or of another dtype; nothing was loaded.
        """
        folder = self.folder / f"step-{step:08d}"
        state = _read_state(folder)
        tensors = self._tensors()
        random_state = torch.get_rng_state()
        if state["world_size"] == dist.get_world_size():
            tensors[f"random_state.{self._rank}"] = random_state
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), planner=_StrictLoadPlanner())
        except (CheckpointException, OSError) as error:
            raise CheckpointError(f"cannot load checkpoint {folder}: {_reason(error)}") from None
        torch.set_rng_state(random_state)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"].fill_(state["optimizer_step"])
        return state["counters"]

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of this rank by checkpoint name: views, so that loading writes in place."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"model.{row}": view for row, view in self._rows.split(name, parameter, parameter.detach())}
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if key != "step":
                    rows = self._rows.split(name, parameter, value)
                    tensors |= {f"optimizer.{key}.{row}": view for row, view in rows}
        persistent = self.model.state_dict().keys() - {name for name, _ in self.model.named_parameters()}
        for name, buffer in self.model.named_buffers():
            if name in persistent:
                tensors[f"model.{name}"] = buffer
        return tensors

    def _file_of_each_name(self, own: dict[str, Tensor]) -> dict[str, int]:
        """Which file, from 1, holds each name of any rank: saving stages a file at a time, so files stay small."""
        names = dict.fromkeys(own)
        for name, parameter in self.model.named_parameters():
            rows = self._rows.all_names(name, parameter)
            names |= dict.fromkeys(f"model.{row}" for row in rows)
            keys = self.optimizer.state.get(parameter, {}).keys() - {"step"}
            names |= dict.fromkeys(f"optimizer.{key}.{row}" for key in sorted(keys) for row in rows)
        names |= dict.fromkeys(f"random_state.{rank}" for rank in range(dist.get_world_size()))
        own_bytes = sum(tensor.numel() * tensor.element_size() for tensor in own.values()) / dist.get_world_size()
        files = max(1, round(own_bytes / _FILE_BYTES))
        ordered = sorted(names)
        return {name: 1 + index * files // len(ordered) for index, name in enumerate(ordered)}

    def _optimizer_step(self) -> float:
        steps = {float(state["step"]) for state in self.optimizer.state.values()}
        if len(steps) != 1:
            raise CheckpointError(
                f"all parameters must have taken the same number of optimizer steps, not {sorted(steps)}"
            )
        return steps.pop()

    def _on_first_rank(self, action: Any) -> None:
        error: Exception | None = None
        if self._rank == 0:
            try:
                action()
            except OSError as caught:
                error = CheckpointError(f"cannot write below {self.folder}: {caught}")
        raise_together(error)

    def _drop_old(self) -> None:
        if self.keep_latest_k:
            for step in _steps(self.folder)[: -self.keep_latest_k]:
                shutil.rmtree(self.folder / f"step-{step:08d}")


class _StrictLoadPlanner(DefaultLoadPlanner):
    """Refuses what torch's reader would load silently: absent names or parts, other shapes, other dtypes."""

    def create_local_plan(self) -> LoadPlan:
        metadata = self.metadata
        assert isinstance(metadata, Metadata)
        assert self.state_dict is not None
        stored = metadata.state_dict_metadata
        problems = {name: _mismatch(stored.get(name), tensor) for name, tensor in self.state_dict.items()}
        wrong = [f"{name} {problem}" for name, problem in problems.items() if problem]
        if wrong:
            raise CheckpointError(f"{'; '.join(wrong[:5])}{f'; and {len(wrong) - 5} more' if len(wrong) > 5 else ''}")
        return super().create_local_plan()


def _mismatch(stored: Any, tensor: Tensor) -> str | None:
    if not isinstance(stored, TensorStorageMetadata):
        return "is missing"
    held = sum(torch.Size(chunk.sizes).numel() for chunk in stored.chunks)
    if stored.size != tensor.shape or held != tensor.numel():
        return f"holds {held} values of shape {tuple(stored.size)}, not {tensor.numel()} of {tuple(tensor.shape)}"
    if stored.properties.dtype != tensor.dtype:
        return f"is {stored.properties.dtype}, not {tensor.dtype}"
    return None


def latest_step(folder: Path) -> int | None:
    """The newest whole checkpoint's step below `folder`, or `None`."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.iterdir() if (path / _STATE_FILE).is_file())
    return sorted(int(match[1]) for match in names if match)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _finish(partial: Path, final: Path, state: dict[str, Any]) -> None:
    """Add what is no tensor and move the whole folder to its place."""
    state["files"] = {path.name: path.stat().st_size for path in sorted(partial.glob("*.safetensors"))}
    with open(partial / _STATE_FILE, "w") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def _read_state(folder: Path) -> dict[str, Any]:
    error: Exception | None = None
    state: dict[str, Any] = {}
    try:
        state = json.loads((folder / _STATE_FILE).read_text())
        if state["format"] != _FORMAT:
            error = CheckpointError(f"checkpoint {folder} has format {state['format']}; this version reads {_FORMAT}")
        for name, size in state["files"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                there = "is missing" if found is None else f"has {found} bytes"
                error = CheckpointError(f"checkpoint {folder}: {name} {there}, not {size} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as caught:
        error = CheckpointError(f"checkpoint {folder}: cannot read {_STATE_FILE}: {caught}")
    raise_together(error)
    return state


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}" if not isinstance(error, CheckpointError) else str(error)
