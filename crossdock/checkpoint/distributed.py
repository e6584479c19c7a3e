"""Checkpoints of a run: torch's distributed checkpoint over safetensors, by logical expert, resharding on load.

A checkpoint is a folder `step-00000020` with safetensors files, written by all ranks, and `state.json`, which holds all
that is no tensor. It is written beside its final place and renamed when whole, so that a crash leaves the previous one.
Nothing in it is executed on load.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from crossdock.checkpoint.background import Background, Staging
from crossdock.checkpoint.dcp_loading import StrictLoadPlanner
from crossdock.checkpoint.dcp_writing import DCPWriter
from crossdock.checkpoint.experts import ExpertRows
from crossdock.checkpoint.finite import what_is_not_finite
from crossdock.checkpoint.folders import (
    CheckpointError,
    finish,
    in_short,
    make_room,
    read_state,
    saved_steps,
    set_aside,
    step_folder,
)
from crossdock.checkpoint.held import Held, Place
from crossdock.checkpoint.hf_writing import file_numbers
from crossdock.checkpoint.verifying import verify_checkpoint
from crossdock.comm import raise_together
from crossdock.lora import adapters_of, base_of
from crossdock.parallel import local_part, local_with_offsets, plain_name

__all__ = ["AsyncMode", "BusyMode", "CheckpointConfig", "Checkpointer", "set_random_states"]

AsyncMode = Literal["disabled", "async"]
BusyMode = Literal["wait", "skip"]

_RANDOM = "random_state."
_OPTIMIZER = "optimizer."
_FILE_BYTES = 256 * 2**20  # What a GPU has of a file is copied first.


@dataclass(frozen=True)
class CheckpointConfig:
    """`[checkpoint]`: when a run is saved."""

    interval: int = 500
    """Steps between checkpoints; the last step is always saved. 0 saves the last step alone."""
    keep_latest_k: int = 2
    """How many checkpoints are kept; 0 keeps all."""
    async_mode: AsyncMode = "disabled"
    """async: a step waits only until its values are copied, and a thread writes the copy. Takes memory for the copy."""
    async_when_busy: BusyMode = "wait"
    """What a checkpoint does that is due while the one before is still being written. The last one always waits."""
    initial_load_in_hf: bool = False
    """A new run starts from the weights in model.hf_assets_path."""
    initial_load_path: str = ""
    """A new run starts from the weights in this folder: one in Hugging Face's format, a run folder or a checkpoint."""
    last_save_in_hf: bool = True
    """When the last step is done, write the folder `hf`, in Hugging Face's format."""
    export_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Of what is written in Hugging Face's format; empty: what loaded weights had, else the run's."""


class Checkpointer:
    """Saves and loads one run's model, optimizer, random state and counters. All methods are collective.

    Every rank of the default process group holds a part of every parameter; without a group, one process holds all.

    Args:
        folder: of the run's checkpoints; all ranks see the same one.
        model: on any layout.
        optimizer: its state exists (`materialise_optimizer_state`) and is tensors alone: of the parameter's shape and
            layout, or scalars. `None` loads weights alone, and saves none.
        keep_latest_k: how many checkpoints are kept; 0 keeps all.
        async_mode: "async" has `save` return when values are copied; a thread writes the copy, which is kept.
        when_busy: what `save` does while the one before is still being written.
        of_base: of a model with adapters (`crossdock.lora`), the weights beside them, with `optimizer = None`.
            Otherwise a checkpoint of such a model holds its adapters alone, and no buffers.
        timeout: of the collectives of the thread that writes; torch's if `None`.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        keep_latest_k: int = 0,
        *,
        async_mode: AsyncMode = "disabled",
        when_busy: BusyMode = "wait",
        of_base: bool = False,
        timeout: timedelta | None = None,
    ) -> None:
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.keep_latest_k = keep_latest_k
        self.when_busy = when_busy
        self.of_base = of_base
        self._rows = ExpertRows(model)
        self._staging = Staging()
        self._background = Background(timeout) if async_mode == "async" else None
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def save(self, step: int, counters: dict[str, Any], *, blocking: bool = False) -> Path | None:
        """Write the checkpoint of `step` with `counters` (what JSON can hold), then drop old ones.

        One of the same step is replaced. Until the new one is whole, nothing else is touched.

        Args:
            step: names it.
            counters: `load` returns them.
            blocking: return when it is whole, whatever `async_mode` is; never skip it.

        Returns:
            Its folder, which stands when `wait` has returned; or `None` where it was skipped.

        Raises:
            CheckpointError: on all ranks, if any of them failed, now or in the write before this one.
        """
        background = None if blocking else self._background
        if background is not None and self.when_busy == "skip" and background.is_busy():
            return None
        self.wait()
        final = step_folder(self.folder, step)
        random_states = self.random_states()
        uncopied: Exception | None = None
        if background is None:
            entries = self._entries(_contiguous)
        else:
            entries, uncopied = self._staged_entries()
        tensors = {name: view for entry in entries for name, view in entry.views.items()}
        tensors |= {f"{_RANDOM}{device}.{self._rank}": state for device, state in random_states.items()}
        # torch hands the first rank's map to all.
        files: dict[str, int] = {}
        for entry, number in zip(entries, file_numbers((each.num_bytes for each in entries), _FILE_BYTES), strict=True):
            files |= dict.fromkeys(entry.all_names, number)
        files |= {f"{_RANDOM}{device}.{rank}": 1 for device in random_states for rank in range(self._world_size)}
        state = {
            "step": step,
            "world_size": self._world_size,
            "random_states": list(random_states),
            "counters": copy.deepcopy(counters),
        }
        write = partial(self._write, uncopied, final, tensors, files, state)
        if background is None:
            write(None)
        else:
            background.start(write, f"cannot write checkpoint {final}")
        return final

    def wait(self) -> None:
        """Wait until what `save` has begun is written.

        Raises:
            CheckpointError: on all ranks, once, if any of them failed.
        """
        if self._background is not None:
            self._background.wait()

    @property
    def is_writing(self) -> bool:
        """Whether this rank is writing a checkpoint beside the training. Not collective."""
        return self._background is not None and self._background.is_writing

    def _write(
        self,
        uncopied: Exception | None,
        final: Path,
        tensors: dict[str, Tensor],
        files: dict[str, int],
        state: dict[str, Any],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Write a checkpoint beside its place, move it there and drop old ones; all collectives are in `group`.

        Raises on all ranks where one has `uncopied`, why it has no copy to write.
        """
        raise_together(uncopied, group)
        beside = final.with_name(f".{final.name}.partial")
        self._on_first_rank(lambda: make_room(beside), group)
        writer = DCPWriter(beside, files)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=group)
        except CheckpointException as error:
            if self._rank == 0:
                shutil.rmtree(beside, ignore_errors=True)
            # What is no matter of the disk may be well when ranks have started again.
            of_disk = isinstance(_first_failure(error), (OSError, CheckpointError))
            kind = CheckpointError if of_disk else RuntimeError
            raise kind(f"cannot write checkpoint {final}: {_reason(error)}") from None
        self._on_first_rank(lambda: finish(beside, final, state, writer.checksums), group)
        self._on_first_rank(lambda: self._drop_old(state["step"]), group)

    def load(self, step: int, *, verified: bool = False) -> dict[str, Any]:
        """Load the checkpoint of `step` into model and optimizer, whatever layout wrote it; returns its counters.

        The random state is restored with the optimizer, where the number of ranks is the same as when it was saved.

        Args:
            step: names it.
            verified: `newest_whole` has found it whole just now, so that its files need not be read twice.

        Raises:
            CheckpointError: on all ranks, naming the file or tensor that is missing, damaged or not this run's.
                Nothing was loaded then, unless the storage failed while whole files were read, or values are NaN or
                infinite.
        """
        folder = step_folder(self.folder, step)
        self.wait()
        state = read_state(folder) if verified else verify_checkpoint(folder)
        entries = self._entries(lambda name, tensor: tensor)
        tensors = {name: view for entry in entries for name, view in entry.views.items()}
        restores = self.optimizer is not None and state["world_size"] == self._world_size
        random_states = self.random_states() if restores else {}
        random_states = {device: own for device, own in random_states.items() if device in state["random_states"]}
        tensors |= {f"{_RANDOM}{device}.{self._rank}": own for device, own in random_states.items()}
        ignored = (_RANDOM,) if self.optimizer is not None else (_RANDOM, _OPTIMIZER)
        expected = {name for entry in entries if not entry.elsewhere for name in entry.all_names}
        elsewhere = {name for entry in entries if entry.elsewhere for name in entry.all_names}
        planner = StrictLoadPlanner(expected, elsewhere, ignored)
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), planner=planner)
        except CheckpointException as error:
            raise CheckpointError(f"cannot load checkpoint {folder}: {_reason(error)}") from None
        self._refuse_nan(folder, tensors)
        self.weights_changed()
        set_random_states(random_states)
        return state["counters"]

    def _refuse_nan(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Raises CheckpointError, on all ranks, for values that are not finite. Buffers may be infinite: masks are."""
        buffers = {f"model.{plain_name(name)}" for name, _ in self.model.named_buffers()}
        problems = []
        for name, tensor in tensors.items():
            if what := what_is_not_finite(local_part(tensor), may_be_infinite=name in buffers):
                problems.append(f"{name} {what}")
        raise_together(CheckpointError(f"checkpoint {folder}: {in_short(problems)}") if problems else None)

    def weights_changed(self) -> None:
        """Tell the model's layers that parameters have new values."""
        self._rows.weights_changed()

    def _staged_entries(self) -> tuple[list[_Entry], Exception | None]:
        """All tensors, copied: training may go on. Or what kept this rank from it, which the others must hear of."""
        try:
            entries = self._entries(self._staging.copy)
            self._staging.finish()
        except CheckpointError:  # on all ranks
            raise
        except (MemoryError, RuntimeError) as caught:
            return [], CheckpointError(f"no memory for the copy that is to be written: {caught}")
        return entries, None

    def _entries(self, taken: Callable[[str, Tensor], Tensor]) -> list[_Entry]:
        """All tensors of model and optimizer but the random state.

        Args:
            taken: gives what is saved or loaded instead of the tensor of a name; laid out as that is.
        """
        entries = []
        for kind, name, parameter, tensor in self._tensors():
            key = f"{kind}.{name}"
            if parameter is None:
                entries.append(_Entry({key: taken(key, tensor)}, [key], tensor.nbytes))
                continue
            _check_shards(name, tensor)
            views = self._rows.split(name, parameter, taken(key, tensor))
            all_names = self._rows.all_names(name, parameter, tensor)
            entries.append(
                _Entry(
                    {f"{kind}.{row}": view for row, view in views.items()},
                    [f"{kind}.{row}" for row in all_names],
                    local_part(tensor).nbytes,
                )
            )
        return entries + self._entries_elsewhere()

    def held(self) -> list[Held]:
        """This rank's part of all tensors, in the order of their names in the model, and where each lies."""
        held = []
        for kind, name, parameter, tensor in self._tensors():
            local, offsets = local_with_offsets(tensor)
            experts = None if parameter is None else self._rows.experts_of(parameter, tensor)
            dtype = str(local.dtype).removeprefix("torch.")
            held.append(Held(Place(f"{kind}.{plain_name(name)}", dtype, tuple(local.shape), offsets, experts), local))
        return held

    def _tensors(self) -> Iterator[tuple[str, str, nn.Parameter | None, Tensor]]:
        """All that a checkpoint holds but random states: kind, name, its parameter (a buffer has none), itself."""
        # First of all, since it makes FSDP shard again what a forward pass has left gathered.
        persistent = self.model.state_dict().keys()
        adapters = {} if self.of_base else adapters_of(self.model)
        for name, parameter in (adapters or base_of(self.model)).items():
            yield "model", name, parameter, parameter.detach()
            states = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
            for key, state in states.items():
                yield f"{_OPTIMIZER}{key}", name, parameter, state
        for name, buffer in self.model.named_buffers() if not adapters else ():
            if plain_name(name) in persistent:
                yield "model", plain_name(name), None, buffer

    def _entries_elsewhere(self) -> list[_Entry]:
        """What other ranks alone have; their optimizers may have less state than these names."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        kinds = ["model.", *sorted({f"{_OPTIMIZER}{key}." for state in states for key in state})]
        entries = [
            _Entry({}, [f"{kind}{name}" for kind in kinds], 4 * shape.numel() * len(kinds), elsewhere=True)
            for name, shape in (self._rows.elsewhere | self._rows.of_other_stages).items()
        ]
        return entries + [_Entry({}, [f"model.{name}"], 0, elsewhere=True) for name in self._rows.buffers_elsewhere]

    def random_states(self) -> dict[str, Tensor]:
        """A copy of the state of this rank's random generators, by device type."""
        states = {"cpu": torch.get_rng_state()}
        # Parameters may have been offloaded; buffers are where the model computes.
        if any(tensor.is_cuda for tensor in chain(self.model.parameters(), self.model.buffers())):
            states["cuda"] = torch.cuda.get_rng_state()
        return states

    def _on_first_rank(self, action: Callable[[], None], group: dist.ProcessGroup | None) -> None:
        error: Exception | None = None
        if self._rank == 0:
            try:
                action()
            except (OSError, TypeError, ValueError) as caught:
                error = CheckpointError(f"cannot write below {self.folder}: {caught}")
        raise_together(error, group)

    def _drop_old(self, saved: int) -> None:
        """Keep the checkpoint that was just saved, and the newest of the others."""
        others = [step for step in saved_steps(self.folder) if step != saved]
        if self.keep_latest_k:
            for step in others[: max(0, len(others) + 1 - self.keep_latest_k)]:
                shutil.rmtree(set_aside(step_folder(self.folder, step)), ignore_errors=True)


def set_random_states(states: dict[str, Tensor]) -> None:
    """Those of `Checkpointer.random_states`."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state)


class _Entry(NamedTuple):
    """One tensor of the model or the optimizer, as a checkpoint names it."""

    views: dict[str, Tensor]
    """What this rank has of it: views, so that loading writes in place."""
    all_names: list[str]
    """The names that any rank has of it."""
    num_bytes: int
    """Of what this rank has, or another."""
    elsewhere: bool = False
    """Whether other ranks alone can have it: they look for it."""


def _check_shards(name: str, tensor: Tensor) -> None:
    """Refuse shards that are no contiguous part of their tensor, whose elements torch would store in wrong places.

    FSDP over dimensions that another sharding has split already is marked as strided, too, but is contiguous.
    """
    if not isinstance(tensor, DTensor):
        return
    sizes = list(zip(tensor.device_mesh.shape, tensor.placements, strict=True))
    for index, (_, placement) in enumerate(sizes):
        if not isinstance(placement, _StridedShard):
            continue
        split = math.prod(size for size, inner in sizes[index + 1 :] if inner.is_shard(placement.dim))
        if placement.split_factor != split:
            raise CheckpointError(
                f"{name} is sharded in interleaved parts ({tensor.placements}), which a checkpoint cannot hold; tensor "
                "parallelism of fused matrices does that"
            )


def _contiguous(name: str, tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where its elements are in another order in memory: safetensors refuses those."""
    return tensor if local_part(tensor).is_contiguous() else tensor.contiguous()


def _first_failure(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = _first_failure(error)
    return f"{type(error).__name__}: {error}" if not isinstance(error, CheckpointError) else str(error)
