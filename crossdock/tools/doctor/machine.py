"""What a machine is and what is installed on it, for people and beside measurements."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

__all__ = ["installed_versions", "machine_facts"]

_INSTRUCTIONS = ("avx2", "avx512f", "amx_bf16")
# Packages under more than one name, by what is shown; the first that is there counts.
_EVERYWHERE = {
    "numpy": ("numpy",),
    "triton": ("triton",),
    "deep_ep": ("deep_ep", "deep-ep"),
    "nvshmem": ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"),
}


def machine_facts() -> dict[str, Any]:
    """Of this machine: `cpu`, `cores` that this process may use, `memory_gib`, vector `instructions`, `gpus`, `driver`
    and what torch was built with (`cuda`, `cudnn`, `nccl`); `None` for what is not there."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    has_gpus = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())] if has_gpus else []
    return {
        "cpu": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "gpu": gpus[0].name if gpus else None,
        "gpus": len(gpus),
        "gpu_memory_gib": round(gpus[0].total_memory / 2**30, 1) if gpus else None,
        "driver": _driver() if has_gpus else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if has_gpus else None,
        "nccl": ".".join(map(str, nccl.version())) if has_gpus else None,
    }


def installed_versions(packages: Iterable[str] = ()) -> dict[str, str | None]:
    """Of Python, torch (`torch_commit` too), numpy, Triton, DeepEP, NVSHMEM and of `packages`; `None` where missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    found["torch_commit"] = torch.version.git_version
    for name, distributions in {**_EVERYWHERE, **{name: (name,) for name in packages if name != "torch"}}.items():
        found[name] = next((each for each in map(_version, distributions) if each is not None), None)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Of the GPUs."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None
