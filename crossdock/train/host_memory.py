"""A rank's memory on a CPU: what the C library is told to keep of it, and when it gives the rest back."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

__all__ = ["GIVE_BACK_INTERVAL", "give_back_memory", "memory_settings"]

GIVE_BACK_INTERVAL = 25
"""Steps between two calls of `give_back_memory`."""


def memory_settings() -> dict[str, str]:
    """Environment variables for ranks on CPUs: huge pages for large tensors, and freed memory that a process keeps.

    Without them, a step spends a part of its time in page faults. Empty where there is a GPU; huge pages alone where
    the C library has no such thresholds, or takes none this high.
    """
    if torch.cuda.is_available():
        return {}
    settings = {"THP_MEM_ALLOC_ENABLE": "1"}
    mmap_threshold, mmap_parameter = 2**30, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # An older glibc refuses more than 32 MiB, and keeps its smallest threshold once the other one is set.
    if mallopt is not None and mallopt(mmap_parameter, mmap_threshold) == 1:
        settings |= {"MALLOC_MMAP_THRESHOLD_": str(mmap_threshold), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    return settings


def give_back_memory() -> None:
    """Return what is free within the heap to the system, where the C library can (glibc).

    Tensors are as large as the tokens that a rank gets, other ones in every step, so that holes remain between those
    that live on; a run that never gave them back would grow with every step that is larger than those before.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    return None if torch.cuda.is_available() else getattr(ctypes.CDLL(None), "malloc_trim", None)
