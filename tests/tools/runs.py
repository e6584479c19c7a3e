"""Run folders made up for the tests of reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossdock.tools.report import LOAD_FILE, LoadLog
from tests.tiny import by_hand

__all__ = ["everything_of", "long_run", "metrics_of", "write_loads", "write_metrics"]


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


def everything_of(step: int, steps: int, **changed: Any) -> dict[str, Any]:
    """A line of a run that was timed, sent bytes between nodes, balanced, in replica groups, and had its troubles."""
    parts = {"data": 0.01, "agreement": 0.02, "forward": 0.2, "backward": 0.3, "router": 0.02, "dispatch": 0.1}
    parts |= {"experts": 0.25, "combine": 0.08, "optimizer": 0.05, "balance": 0.0, "other": 0.01 + (step % 50 == 0)}
    return {
        **metrics_of(step, steps),
        "step_seconds": sum(parts.values()),
        **{f"{name}_seconds": seconds for name, seconds in parts.items()},
        "load_entropy": 0.9 + 0.05 * math.sin(step / 9),
        "load_variation": 0.4,
        "dead_experts": 3 * (step < steps / 5),
        "dropped_routes": step % 7,
        "bytes_within_nodes": 300_000_000 + 100_000 * (step % 11),
        "bytes_between_nodes": 200_000_000,
        "least_bytes_within_nodes": 250_000_000,
        "least_bytes_between_nodes": 100_000_000,
        "metadata_bytes": 1_000_000,
        "rank_max_mean_before": 2.5,
        "rank_max_mean": 1 + 1 / step,
        "imbalance_seconds": 0.2 / step,
        "spikes": int(step > steps / 3),
        "rollbacks": int(step > steps / 3),
        "passed_over_samples": 64 * (step > steps / 3),
        "replica_groups": 2 - (steps / 3 < step < steps / 2),
        "stall_seconds": 0.1 + (step == steps // 3),
        "slowest_rank": 3,
        "slowest_rank_ratio": 1.3,
        **changed,
    }


def long_run(folder: Path, steps: int) -> Path:
    """A run folder with settings and all metrics that there are, without loads."""
    write_metrics(folder, [everything_of(step, steps) for step in range(1, steps + 1)])
    (folder / "config.toml").write_text(by_hand(f"[training]\nsteps = {steps}\n[moe]\nranks_per_node = 8\n"))
    return folder


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
