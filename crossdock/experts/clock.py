"""How long experts take, on the device that computes them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["ExpertClock"]


class ExpertClock:
    """Seconds that experts were computed in forward passes; on a GPU its own time, without waiting for it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """While experts are computed on `device`."""
        if device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            ended.record()
            self._events.append((begun, ended))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """Seconds since the last call; at a moment when the GPU has been waited for anyway."""
        for begun, ended in self._events:
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds
