"""Taking what `crossdock tune` has measured, in the place of settings that a run leaves open."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from crossdock.config import Config, ConfigError
from crossdock.config.tuned import (
    AUTOMATIC,
    THREADS,
    TunedEntry,
    TunedFileError,
    TunedKey,
    find_entry,
    near_miss,
    read_tuned,
    tile_table,
    tuned_file,
)
from crossdock.moe import moe_layers
from crossdock.parallel import Meshes
from crossdock.train.together import from_first_rank

__all__ = ["take_tuned"]

logger = logging.getLogger(__name__)


class _Found(NamedTuple):
    """What the first rank has read."""

    entry: TunedEntry | None
    path: Path
    message: str = ""
    is_damaged: bool = False


def take_tuned(model: nn.Module, config: Config, meshes: Meshes, device: torch.device, *, threads: bool) -> None:
    """Give the MoE layers of a model, and this process, what was measured for them, and say so. Collective.

    All ranks take what the first one reads. What the run sets itself stays as it is set.

    Args:
        model: before `parallelize`.
        config: `training.tuned` says where from.
        meshes: its layout.
        device: of this rank.
        threads: whether the number of threads was left open.

    Raises:
        ConfigError: on all ranks, for a file that the run names and that cannot be read. One that is looked for by
            itself is warned of.
    """
    training = config.training
    # What lies in a cache by chance, and what was measured, is not the same for all runs.
    if training.tuned == "off" or (training.tuned == "auto" and training.deterministic) or config.lora.rank:
        return
    layers = list(moe_layers(model).values())
    key = TunedKey.of(
        layers[0],
        tokens_per_rank=config.training.local_batch_size * config.training.seq_len // meshes.sequence_degree,
        ep=meshes.size("ep"),
        dtype=config.training.dtype,
        device=device,
    )
    found: _Found | None = from_first_rank(lambda: _find(config.training.tuned, key))
    if found is None:
        return
    if found.entry is None:
        (logger.warning if found.is_damaged else logger.info)(found.message)
        return
    taken = _open_settings(found.entry.choices, config, device, threads)
    backend = taken.get("experts", config.moe.experts)
    tiles = tile_table(found.entry.choices) if backend == "triton" else None
    words = [f"{name} = {value}" for name, value in taken.items()]
    if tiles is not None:
        words.append(f"tiles of {', '.join(dict.fromkeys(kernel for kernel, _ in tiles))}")
    said = ", ".join(words)
    if not said:
        defaults = "the defaults won, or what won is set otherwise"
        logger.info(f"tuned: nothing taken from {found.path} (measured {found.entry.date}): {defaults}")
        return
    if THREADS in taken:
        torch.set_num_threads(taken.pop(THREADS))
    for layer in layers:
        layer.reconfigure(replace(layer.config, **taken))
        layer.experts.kernel_tiles = tiles
    logger.info(f"tuned: {said}, from {found.path} (measured {found.entry.date})")


def _find(tuned: str, key: TunedKey) -> _Found | None:
    """What there is for `key`; `None` where there is nothing to say."""
    path = tuned_file(tuned)
    if path is None or (tuned == "auto" and not path.exists()):
        return None
    try:
        entries = read_tuned(path)
    except TunedFileError as error:
        if tuned != "auto":
            raise ConfigError("training.tuned", tuned, str(error)) from None
        return _Found(None, path, f"tuned: nothing taken: {error}", is_damaged=True)
    if (entry := find_entry(entries, key)) is not None:
        return _Found(entry, path)
    if near := near_miss(entries, key):
        return _Found(None, path, f"tuned: nothing for this run in {path}; the nearest entry has {near}")
    if tuned != "auto":
        return _Found(None, path, f"tuned: nothing for this run in {path}")
    return None


def _open_settings(choices: Mapping[str, Any], config: Config, device: torch.device, threads: bool) -> dict[str, Any]:
    """Those of `choices` that the run leaves open."""
    taken = {
        name: choices[name]
        for name, usual in AUTOMATIC.items()
        if name in choices and getattr(config.moe, name) == usual
    }
    if THREADS in choices and threads and device.type == "cpu":
        taken[THREADS] = choices[THREADS]
    return taken
