"""A checkpoint that is written while training goes on: from a copy, in a thread, over a process group of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from crossdock.checkpoint.folders import CheckpointError
from crossdock.comm import raise_together
from crossdock.parallel import as_shard, local_part

__all__ = ["Background", "Staging"]


class Staging:
    """Copies of this rank's tensors in the machine's memory, kept so that the next copy takes no memory."""

    def __init__(self) -> None:
        # This rank's part, and the whole that it is a part of.
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, contiguous, laid out over the ranks as it is; overwritten by the next one of that name.

        One from a GPU is whole after `finish` only.
        """
        local = local_part(tensor)
        buffer, whole = self._kept.get(name, (None, None))
        if buffer is None or whole is None or _description(buffer, whole) != _description(local, tensor):
            buffer = whole = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            if isinstance(tensor, DTensor):
                whole = as_shard(buffer, tensor.device_mesh, tensor.placements, tensor.shape)
            self._kept[name] = buffer, whole
        buffer.copy_(local, non_blocking=True)
        return whole

    def finish(self) -> None:
        """Wait for copies from a GPU."""
        if any(buffer.is_pinned() for buffer, _ in self._kept.values()):
            torch.cuda.current_stream().synchronize()


def _description(local: Tensor, whole: Tensor) -> tuple[Any, ...]:
    layout = (whole.device_mesh, whole.placements, whole.shape) if isinstance(whole, DTensor) else None
    return local.shape, local.dtype, layout


class Background:
    """One write at a time beside the training, in a thread that talks to the other ranks over a group of its own.

    Every rank starts the same writes. All methods but `start` are collective, and so is making one.

    Args:
        timeout: of its collectives; torch's if `None`.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        assert not isinstance(group, int), "every rank is in it"
        self._group = group
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, write: Callable[[dist.ProcessGroup | None], object], failed: str) -> None:
        """Run `write` in the thread; the one before has been waited for.

        Args:
            write: takes the group that all its collectives must be in.
            failed: begins the message of an error that is none of a `CheckpointError` and a rank that is gone.
        """
        assert self._thread is None

        def run() -> None:
            try:
                write(self._group)
            except RuntimeError as error:  # A CheckpointError; or a rank that is gone, which ends more than this write.
                self._error = error
            except Exception as error:  # noqa: BLE001 (whatever it is, the run must hear of it)
                self._error = CheckpointError(f"{failed}: {type(error).__name__}: {error}")

        # No daemon: a process that ends without waiting still ends after the write.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether a write of this rank's goes on. Not collective."""
        return self._thread is not None and self._thread.is_alive()

    def is_busy(self) -> bool:
        """Whether a write goes on, on any rank: the same answer on all."""
        if self._thread is None:
            return False
        busy = [self._thread.is_alive()]
        if dist.is_initialized():
            busy = [False] * dist.get_world_size()
            dist.all_gather_object(busy, self._thread.is_alive())
        return any(busy)

    def wait(self) -> None:
        """Wait for the write that goes on, if one does.

        Raises:
            CheckpointError: on all ranks, once, if it failed on any.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        raise_together(error)
