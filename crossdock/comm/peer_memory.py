"""Memory that several ranks read and write: the buffers of all of them, as a table of addresses.

Three providers: GPUs that map each other's memory, ranks that take turns in one process, and processes of one machine
whose CPU kernels are interpreted.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.comm.collectives import raise_together
from crossdock.kernels.symmetric import Window

__all__ = ["GpuMemory", "PeerMemory", "SharedFiles", "VirtualRanks", "peer_memory"]


class PeerMemory(Protocol):
    """Where one rank gets buffers from that its peers can reach."""

    def allocate(self, num_bytes: int, device: torch.device) -> Window:
        """A buffer of as many bytes on every rank, all of them zeros before any rank returns. Collective."""
        ...


def peer_memory(group: dist.ProcessGroup, device: torch.device) -> PeerMemory:
    """That of the ranks of `group`, a process each, for tensors on `device`."""
    return GpuMemory(group) if device.type == "cuda" else SharedFiles(group)


class GpuMemory:
    """torch's symmetric memory: GPUs of one NVLink domain, a process each. It has not run on hardware yet.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def allocate(self, num_bytes: int, device: torch.device) -> Window:
        """As every provider's.

        Raises:
            RuntimeError: where the GPUs cannot map each other's memory; says what can.
        """
        from torch.distributed import _symmetric_memory as symmetric_memory  # loads NVSHMEM, where there is any

        own, error = None, None
        try:
            own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as cause:
            error = self._refusal(cause)
        # A rank without memory would leave the others waiting in `rendezvous`.
        raise_together(error, self.group)
        assert own is not None
        try:
            handle = symmetric_memory.rendezvous(own, self.group)
        except RuntimeError as cause:
            raise self._refusal(cause) from cause
        own.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(self.group)
        # A buffer may begin somewhere within what is mapped, at the same place on all ranks.
        rank = self.group.rank()
        offset = own.data_ptr() - handle.buffer_ptrs[rank]
        addresses = torch.tensor([first + offset for first in handle.buffer_ptrs], dtype=torch.int64, device=device)
        return Window(addresses, own, rank, keep=handle)

    def _refusal(self, cause: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"dispatcher 'symmetric': the GPUs of the {self.group.size()} ranks that hold the experts cannot map "
            "each other's memory; they must be different GPUs of one NVLink domain, usually of one machine; use "
            f"'alltoall' ({cause})"
        )


class VirtualRanks:
    """Ranks of one process that take turns, phase by phase; their buffers are on one device.

    Args:
        num_ranks: how many.
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._buffers: list[list[Tensor]] = []

    def of(self, rank: int) -> PeerMemory:
        """The provider of one of them; all must allocate the same, in the same order."""
        return _VirtualMemory(self._buffers, self.num_ranks, rank)


class _VirtualMemory:
    def __init__(self, buffers: list[list[Tensor]], num_ranks: int, rank: int) -> None:
        self._buffers, self._num_ranks, self._rank = buffers, num_ranks, rank
        self._allocated = 0

    def allocate(self, num_bytes: int, device: torch.device) -> Window:
        if self._allocated == len(self._buffers):
            self._buffers.append(
                [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(self._num_ranks)]
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # each rank has a stream of its own
        buffers = self._buffers[self._allocated]
        self._allocated += 1
        return _window(buffers, self._rank, device)


class SharedFiles:
    """Files in memory that processes of one machine map, each at addresses of its own; for interpreted kernels.

    Stores and atomic operations of processes that map a file are those on one memory: signals order rows as on a GPU.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def allocate(self, num_bytes: int, device: torch.device) -> Window:
        """As every provider's.

        Raises:
            RuntimeError: on all ranks, where they are on several machines.
            OSError: on all ranks, where one has no room.
        """
        path, error = None, None
        try:
            path = _make_file(num_bytes)
        except OSError as caught:
            error = caught
        raise_together(error, self.group)
        assert path is not None
        try:
            files: list[tuple[str, str]] = [("", "")] * self.group.size()
            dist.all_gather_object(files, (socket.gethostname(), str(path)), group=self.group)
            hosts = sorted({host for host, _ in files})
            if len(hosts) > 1:
                raise RuntimeError(
                    f"dispatcher 'symmetric' needs ranks of one machine, not of {', '.join(hosts)}; use 'alltoall'"
                )
            buffers = [torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8) for _, name in files]
            dist.barrier(self.group)
        finally:
            path.unlink()  # what is mapped stays
        return _window(buffers, self.group.rank(), device)


def _make_file(num_bytes: int) -> Path:
    """A file of zeros, in memory where there is room."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        if not Path(folder).is_dir():
            continue
        descriptor, name = tempfile.mkstemp(prefix="crossdock-", dir=folder)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError:
            os.unlink(name)
        else:
            return Path(name)
        finally:
            os.close(descriptor)
    raise OSError(f"no room for {num_bytes} bytes of buffers in /dev/shm or {tempfile.gettempdir()}")


def _window(buffers: list[Tensor], rank: int, device: torch.device) -> Window:
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64, device=device)
    return Window(addresses, buffers[rank], rank, keep=buffers)
