"""Run folders made up for the tests of reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossdock.tools.report import LOAD_FILE, LoadLog

__all__ = ["metrics_of", "write_loads", "write_metrics"]


def metrics_of(step: int, steps: int, **changed: Any) -> dict[str, Any]:
    """A line of metrics.jsonl as the trainer writes it."""
    return {
        "step": step,
        "loss": 2 + 7 * math.exp(-5 * step / steps) + 0.05 * math.sin(step),
        "sequence_aux_loss": 1 + 0.3 * math.exp(-3 * step / steps),
        "grad_norm": 1 + 0.5 * math.sin(3 * step),
        "lr": 3e-3 * (1 - 0.9 * step / steps),
        "memory_gib": 0.73,
        "max_mean_load": 1.5 + 2 * math.exp(-5 * step / steps),
        "tokens": 2048,
        "skipped_steps": 0,
        "tokens_per_second_per_gpu": 1500 + 100 * math.cos(step),
        **changed,
    }


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_loads(folder: Path, counts: np.ndarray, interval: int = 10, name: str = LOAD_FILE) -> None:
    """Records of `counts` `[N, L, E]` in the file `name`, at `interval`, twice that, and so on."""
    _, layers, width = counts.shape
    log = LoadLog(folder / name, layers, width, 0)
    for index, own in enumerate(counts):
        log.write((index + 1) * interval, torch.from_numpy(own.astype(np.int64)))
    log.close()
