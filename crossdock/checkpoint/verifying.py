"""Whether a run's checkpoints are what was written: damaged ones are found, named and passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from crossdock.checkpoint.checksums import file_checksum
from crossdock.checkpoint.folders import CheckpointError, OtherFormatError, read_state, saved_steps, step_folder
from crossdock.comm import raise_together

__all__ = ["DAMAGED", "newest_whole", "verify_checkpoint"]

DAMAGED = "damaged"
"""The ending that the folder of a checkpoint gets that was passed over: nothing reads, replaces or removes it."""


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Compare all files of a checkpoint with its checksums, each rank its share; returns its state. Collective.

    Raises:
        CheckpointError: on all ranks, naming a file that is missing, damaged or not of this checkpoint.
        OtherFormatError: likewise, if another version has written it.
    """
    state = read_state(folder)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    error: CheckpointError | None = None
    # By size, so that the ranks have as much to read as each other.
    by_size = sorted(state["files"].items(), key=lambda entry: (-entry[1]["size"], entry[0]))
    for name, about in by_size[rank::world_size]:
        try:
            # What is no safetensors file is said to be none: torch's reader would not name it.
            with safe_open(folder / name, framework="pt"):
                pass
            if file_checksum(folder / name) != about["checksum"]:
                error = CheckpointError(f"checkpoint {folder}: {name} is damaged: its checksum is not what was written")
        except (OSError, SafetensorError) as caught:
            error = CheckpointError(f"checkpoint {folder}: cannot read {name}: {caught}")
    raise_together(error)
    return state


def newest_whole(folder: Path) -> tuple[int | None, list[str]]:
    """The newest checkpoint below `folder` whose files are what was written; reads all of it. Collective.

    Newer ones that are damaged are passed over: they are renamed to `step-....damaged`, so that none is taken for a
    good one by `keep_latest_k`, or replaced by a later save.

    Args:
        folder: of the run's checkpoints.

    Returns:
        Its step, `None` where there is no checkpoint; and a message for each one that was passed over.

    Raises:
        CheckpointError: on all ranks, if there are checkpoints and all are damaged, or one cannot be renamed.
        OtherFormatError: on all ranks, if another version has written the newest one that is not damaged.
    """
    passed: list[tuple[int, str]] = []
    for step in reversed(_agreed_steps(folder)):
        try:
            verify_checkpoint(step_folder(folder, step))
        except OtherFormatError:
            raise
        except CheckpointError as error:
            passed.append((step, str(error)))
            continue
        names = _put_aside(folder, [step for step, _ in passed])
        messages = [
            f"{problem}. It is passed over, and is {name} now" for (_, problem), name in zip(passed, names, strict=True)
        ]
        return step, messages
    if passed:
        problems = "; ".join(problem for _, problem in passed)
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {problems}. Give the files back, or choose another job.dump_folder"
        )
    return None, []


def _agreed_steps(folder: Path) -> list[int]:
    """The steps that the first rank sees below `folder`."""
    error: Exception | None = None
    steps: list[Any] = [[]]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            steps = [saved_steps(folder)]
        except OSError as caught:
            error = CheckpointError(f"cannot read {folder}: {caught.strerror}")
    raise_together(error)
    if dist.is_initialized():
        dist.broadcast_object_list(steps, src=0)
    return steps[0]


def _put_aside(folder: Path, steps: list[int]) -> list[str]:
    """Rename damaged checkpoints on the first rank, when all ranks have looked at them; returns their new names."""
    error: Exception | None = None
    names: list[Any] = [[]]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            names = [[_rename(step_folder(folder, step)) for step in steps]]
        except OSError as caught:
            error = CheckpointError(f"cannot put a damaged checkpoint in {folder} aside: {caught}")
    raise_together(error)
    if dist.is_initialized():
        dist.broadcast_object_list(names, src=0)
    return names[0]


def _rename(folder: Path) -> str:
    aside, number = folder.with_name(f"{folder.name}.{DAMAGED}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{DAMAGED}-{number}")
    folder.rename(aside)
    return aside.name
