"""Ranks as processes of their own, which a test may stop, kill or have fail; what each of them printed, and its end."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.ranks import PRELOADED

__all__ = ["Ended", "run_processes"]


class Ended(NamedTuple):
    """What became of a rank: its exit code, minus the signal's number where one killed it, and all that it printed."""

    code: int | None
    output: str


def run_processes(
    world_size: int, function: Callable[..., Any], *args: Any, folder: Path, timeout: float = 120
) -> list[Ended]:
    """Call `function(*args)`, which returns an exit code, in as many processes, with the environment of torchrun.

    As under torchrun, the store is in none of the ranks. `folder` takes what they print, and is the launcher's folder
    for failures.

    Raises:
        AssertionError: with all that was printed, if they have not ended after `timeout` seconds.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # The imports take seconds; that server starts no threads, so forking it is safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    processes = [
        context.Process(target=_be_rank, args=(rank, world_size, store.port, str(folder), function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    outputs = [(folder / f"output-{rank}").read_text(errors="replace") for rank in range(world_size)]
    assert None not in codes, "\n".join(
        f"rank {rank}: {code}\n{output}" for rank, (code, output) in enumerate(zip(codes, outputs, strict=True))
    )
    return [Ended(*pair) for pair in zip(codes, outputs, strict=True)]


def _be_rank(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    output = os.open(f"{folder}/output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    faulthandler.enable()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "CROSSDOCK_ENDED_FOLDER": folder,
    }
    sys.exit(function(*args))
