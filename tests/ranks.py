"""A pool of worker processes that distributed tests borrow as ranks of a gloo group."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

__all__ = ["PRELOADED", "RankPool"]

_COLLECTIVE_SECONDS = 60
# Caches of DTensor keep meshes, and so process groups, whose threads wake up a hundred times a second.
_THREADS = 40
PRELOADED = ("torch.distributed.fsdp", "transformers.models.qwen3_moe.modeling_qwen3_moe", "crossdock.train.trainer")


class _Crash(AssertionError):
    """A worker was ended by a signal that nobody sent."""


class RankPool:
    """Workers that stay alive between tests, forked from a process that has imported all; made anew after a failure."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="crossdock-ranks-")
        self._runs = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
        """Call `function(*args)` on `world_size` ranks, with a default process group; the results in rank order.

        `function` and what it returns must pickle: module-level functions, no tensors that share memory (return
        numbers or numpy arrays).

        Torch's functional all-gather over gloo corrupts the heap now and then (`crossdock.comm.collectives.all_gather`
        stays away from it, DTensor does not): where a worker crashes, the call is warned of, with the stacks of all
        threads, and made once more.

        Raises:
            AssertionError: with the tracebacks, if a rank failed or did not return within `timeout` seconds.
        """
        try:
            return self._run(world_size, function, args, timeout)
        except _Crash as crash:
            warnings.warn(f"a worker crashed, the call is made once more: {crash}", stacklevel=2)
            return self._run(world_size, function, args, timeout)

    def _run(self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        while len(self._workers) < world_size:
            self._workers.append(_spawn(self._folder.name))
        self._runs += 1
        store = Path(self._folder.name) / f"store-{self._runs}"
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            connection.send((rank, world_size, str(store), function, args))
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * world_size
        failures: list[str] = []
        crashed = False
        for rank, (process, connection) in enumerate(self._workers[:world_size]):
            if not connection.poll(max(0.1, deadline - time.monotonic()) if not failures else 5.0):
                failures.append(f"rank {rank}: no result within {timeout} s")
                continue
            try:
                succeeded, value = connection.recv()
            except EOFError:
                process.join(5)
                succeeded, value = False, f"the process ended with {process.exitcode}\n{self._crash_report(process)}"
                crashed |= process.exitcode in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
            results[rank] = value
            if not succeeded:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.close()
            raise (_Crash if crashed else AssertionError)("\n".join(failures))
        for rank, (process, _) in enumerate(self._workers[:world_size]):
            if _threads(process.pid) > _THREADS:
                _end(*self._workers[rank])
                self._workers[rank] = _spawn(self._folder.name)
        return results

    def _crash_report(self, process: Any) -> str:
        path = _report_path(self._folder.name, process.pid)
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        for worker in self._workers:
            _end(*worker)
        self._workers = []


def _threads(pid: int | None) -> int:
    # Of the process, as Linux counts them; elsewhere workers keep theirs.
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def _end(process: Any, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


def _report_path(folder: str, pid: int) -> Path:
    return Path(folder, f"crash-{pid}")


def _spawn(folder: str) -> tuple[Any, Connection]:
    # The imports take seconds; that server starts no threads, so forking it is safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, folder), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(connection: Connection, folder: str) -> None:
    torch.set_num_threads(1)
    crash_report = open(_report_path(folder, os.getpid()), "w")  # noqa: SIM115 (open as long as the worker lives)
    faulthandler.enable(crash_report)
    gc.freeze()  # what is imported stays: collecting what a test leaves takes milliseconds
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        try:
            rank, world_size, store, function, args = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=_COLLECTIVE_SECONDS),
            )
            result = function(*args)
            dist.barrier()
            dist.destroy_process_group()
            # DTensor remembers meshes whose process groups are gone now.
            _clear_sharding_prop_cache()
            gc.collect()
            connection.send((True, result))
        except BaseException:  # noqa: BLE001 (whatever it was, the test wants to see it)
            connection.send((False, traceback.format_exc()))
            return
