"""The one message of a rank that has run out of memory: what it asked for, what was free, what would need less."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from crossdock.config import Config

__all__ = ["memory_message"]

# torch's message on a GPU, and that of its allocator on a CPU.
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB|B)?")
_UNITS = {"": 1, "bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# Limits beyond this stand for none.
_NO_LIMIT = 2**60


def memory_message(error: BaseException, config: Config, device: torch.device) -> str:
    """For a person.

    Args:
        error: that was raised.
        config: of the run.
        device: of the rank.
    """
    match = _ASKED.search(str(error))
    asked = _size(float(match[1]) * _UNITS[match[2] or ""]) if match else "memory (how much is not known)"
    # The machine's memory may be what a rank with a GPU has run out of: pinned copies, offloaded states.
    on_gpu = device.type == "cuda" and isinstance(error, torch.OutOfMemoryError)
    free = _gpu_memory(device) if on_gpu else _machine_memory()
    settings = "\n".join(f"  {line}" for line in _settings(config, on_gpu=on_gpu))
    return f"out of memory. It asked for {asked}; {free}.\nLess is needed with\n{settings}"


def _size(num_bytes: float) -> str:
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:,.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _gpu_memory(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    return f"{_size(free)} of the GPU's {_size(total)} were free, {_size(held)} of them were this rank's"


def _machine_memory() -> str:
    words = []
    facts = _read_facts(Path("/proc/meminfo"))
    if {"MemAvailable:", "MemTotal:"} <= facts.keys():
        available, total = facts["MemAvailable:"] * 2**10, facts["MemTotal:"] * 2**10
        words.append(f"{_size(available)} of the machine's {_size(total)} were free")
    limit = _cgroup_limit()
    if limit is not None:
        words.append(f"its control group uses {_size(limit[0])} of the {_size(limit[1])} that it may")
    return ", ".join(words) or "how much was free is not known"


def _read_facts(path: Path) -> dict[str, int]:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _cgroup_limit() -> tuple[int, int] | None:
    """Bytes that this process's control group uses and may use; `None` without a limit. Versions 2 and 1."""
    mount = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            folders, names = (mount / group.lstrip("/"), mount), ("memory.current", "memory.max")
        elif "memory" in controllers.split(","):
            names = ("memory.usage_in_bytes", "memory.limit_in_bytes")
            # Within a container, its own group is where the mount begins.
            folders = (mount / "memory" / group.lstrip("/"), mount / "memory")
        else:
            continue
        for folder in folders:
            try:
                used, limit = ((folder / name).read_text().strip() for name in names)
            except OSError:
                continue
            if limit.isdigit() and int(limit) < _NO_LIMIT:
                return int(used), int(limit)
    return None


def _settings(config: Config, *, on_gpu: bool) -> list[str]:
    """Settings that lower what a rank needs, and are not as low as they can be."""
    training, parallelism, moe, balance = config.training, config.parallelism, config.moe, config.balance
    world = "more ranks share parameters and their optimizer states (--nproc, --nnodes)"
    lines = []
    if training.local_batch_size > 1:
        lines.append(f"training.local_batch_size = {training.local_batch_size}: fewer sequences at a time")
    lines.append(f"training.seq_len = {training.seq_len}: shorter sequences")
    if config.activation_checkpoint.mode != "full":
        mode = config.activation_checkpoint.mode
        lines.append(f"activation_checkpoint.mode = {mode}: {'full' if mode == 'selective' else 'selective, or full'}")
    if parallelism.reshard_after_forward != "always":
        lines.append(f"parallelism.reshard_after_forward = {parallelism.reshard_after_forward}: always")
    if on_gpu and not training.enable_cpu_offload:
        lines.append(
            "training.enable_cpu_offload = false: true, to keep parameters and optimizer in the machine's memory"
        )
    if moe.capacity_factor == 0 or moe.capacity_factor > 1.25:
        lines.append(
            f"moe.capacity_factor = {moe.capacity_factor:g}: a bound, such as 1.25, on the tokens of an expert"
        )
    if balance.strategy in ("none", "eplb"):
        lines.append(f"balance.strategy = {balance.strategy}: spill, with balance.memory_bound, where busy ranks fail")
    elif not balance.memory_bound:
        lines.append("balance.memory_bound = false: true, where busy ranks fail")
    if training.dtype != "bfloat16":
        lines.append(f"training.dtype = {training.dtype}: bfloat16")
    return [*lines, world]
