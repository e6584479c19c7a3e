"""What of crossdock works on this machine, and what is missing for the rest; nothing is collective here."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.dispatch import DISPATCHERS, DeepEPOptions, deepep_problem, symmetric_problem
from crossdock.experts import EXPERTS_BACKENDS, ExpertParams, backend_problem

__all__ = ["Finding", "checkup"]

# Sizes that every kernel takes, for what depends on sizes at all.
_HIDDEN, _TOP_K, _SLOTS = 256, 2, 8
_GIB = 2**30
# Extras of the package, and what each brings.
_EXTRAS = {
    "transformers": "accelerate",
    "datasets": "datasets",
    "peft": "peft",
    "torchft": "torchft",
    "liger": "liger_kernel",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        group: what it belongs to.
        name: of it.
        problem: why it cannot be used, and what to do; empty where it can.
        detail: what else there is to say.
    """

    group: str
    name: str
    problem: str = ""
    detail: str = ""


def checkup(device: torch.device, num_ranks: int) -> list[Finding]:
    """Of process groups, dispatchers for `num_ranks` ranks on `device`, experts backends, links, memory and extras."""
    return [
        *_process_groups(),
        *(Finding("dispatcher", name, _dispatcher_problem(name, device, num_ranks)) for name in DISPATCHERS),
        *(Finding("experts", name, problem) for name, problem in _experts(device)),
        *_links(),
        _shared_memory(),
        *_extras(),
    ]


def _process_groups() -> list[Finding]:
    found = []
    for name, is_there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())):
        problem = "" if is_there else "torch was built without it"
        if is_there and name == "nccl" and not torch.cuda.is_available():
            problem = "there is no GPU that torch can use"
        found.append(Finding("process group", name, problem))
    return found


def _dispatcher_problem(name: str, device: torch.device, num_ranks: int) -> str:
    problems: dict[str, Callable[[], str | None]] = {
        "local": lambda: "is for one rank that holds all experts" if num_ranks > 1 else None,
        "deepep": lambda: _deepep_problem(device, num_ranks),
        "symmetric": lambda: symmetric_problem(device),
        "hierarchical": lambda: None if num_ranks > 3 else "needs two ranks on each of two nodes; it is alltoall here",
    }
    return (problems[name]() or "") if name in problems else ""


def _deepep_problem(device: torch.device, num_ranks: int) -> str | None:
    if device.type != "cuda":
        return "needs GPUs of SM90 or newer, and the package deep_ep with NVSHMEM"
    return deepep_problem(num_ranks, _SLOTS, _HIDDEN, _TOP_K, torch.bfloat16, DeepEPOptions())


def _experts(device: torch.device) -> list[tuple[str, str]]:
    dtype = torch.bfloat16
    tokens = torch.empty(0, _HIDDEN, dtype=dtype, device=device)

    def weight(rows: int, columns: int) -> Tensor:
        return torch.empty(1, rows, columns, dtype=dtype, device=device)

    params = ExpertParams(weight(2 * _HIDDEN, _HIDDEN), weight(_HIDDEN, _HIDDEN))
    return [(name, backend_problem(name, tokens, params) or "") for name in EXPERTS_BACKENDS]


def _links() -> list[Finding]:
    """What ranks talk over: GPUs that reach one another's memory, InfiniBand, network interfaces."""
    found = []
    gpus = torch.cuda.device_count()
    if gpus > 1:
        apart = [
            f"{one}-{other}"
            for one in range(gpus)
            for other in range(one + 1, gpus)
            if not torch.cuda.can_device_access_peer(one, other)
        ]
        problem = f"these pairs do not reach one another's memory: {', '.join(apart)}" if apart else ""
        found.append(Finding("link", f"{gpus} GPUs", problem))
    found += [Finding("link", path.name, detail="InfiniBand") for path in _entries("/sys/class/infiniband")]
    for path in _entries("/sys/class/net"):
        try:
            speed = int((path / "speed").read_text())
        except (OSError, ValueError):  # A virtual one has none.
            speed = -1
        found.append(Finding("link", path.name, detail=f"{speed / 1000:g} Gbit/s" if speed > 0 else ""))
    return found


def _entries(folder: str) -> list[Path]:
    return sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("memory", str(folder), "is not there; fault_tolerance.snapshot_folder needs a folder in memory")
    free = shutil.disk_usage(folder).free
    small = "has room for small snapshots alone: docker run --shm-size, or an emptyDir with medium Memory"
    return Finding("memory", str(folder), small if free < _GIB else "", f"{free / _GIB:.1f} GiB free")


def _extras() -> list[Finding]:
    return [
        Finding("extra", extra, "" if importlib.util.find_spec(module) else f"pip install 'crossdock[{extra}]'")
        for extra, module in _EXTRAS.items()
    ]
