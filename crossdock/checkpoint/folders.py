"""The folder of a run's checkpoints: which there are, whether one is whole, and how one takes its final name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossdock.checkpoint.checksums import parse_checked_json, to_checked_json
from crossdock.comm import raise_together

__all__ = [
    "CHECKPOINT_FOLDER",
    "CheckpointError",
    "OtherFormatError",
    "find_checkpoint",
    "finish",
    "holds_weights_alone",
    "in_short",
    "latest_step",
    "make_room",
    "read_counters",
    "read_state",
    "replace_folder",
    "saved_steps",
    "saved_world_size",
    "set_aside",
    "step_folder",
]

CHECKPOINT_FOLDER = "checkpoint"
"""Of a run folder, where its checkpoints are."""
_STATE_FILE = "state.json"
_FORMAT = 2
_SHOWN = 8


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the folder and what is wrong with it."""


class OtherFormatError(CheckpointError):
    """A checkpoint that another version has written: it may be whole."""


def in_short(problems: Sequence[str]) -> str:
    """The first few, as one sentence, and how many more there are."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def find_checkpoint(path: Path) -> tuple[Path, int] | None:
    """The folder of checkpoints and the step that `path` names: a checkpoint, or a run folder for its newest one."""
    if path == Path():  # No path: not the working directory.
        return None
    try:
        # A folder of such a name may hold a model of another format.
        if (match := re.fullmatch(r"step-(\d{8,})", path.name)) and (
            (path / _STATE_FILE).is_file() or any(path.glob("shard-*.safetensors"))
        ):
            return path.parent, int(match[1])
        newest = latest_step(path / CHECKPOINT_FOLDER)
    except OSError:  # A name that is too long, a folder that may not be read.
        return None
    return None if newest is None else (path / CHECKPOINT_FOLDER, newest)


def latest_step(folder: Path) -> int | None:
    """The newest checkpoint's step below `folder`, or `None`; whether it is whole, reading it tells."""
    steps = saved_steps(folder)
    return steps[-1] if steps else None


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands, below the folder of checkpoints."""
    return folder / f"step-{step:08d}"


def saved_world_size(folder: Path, step: int) -> int | None:
    """How many ranks wrote the checkpoint of `step` below `folder`; `None` where it does not tell."""
    try:
        return _parse_state(step_folder(folder, step))["world_size"]
    except CheckpointError:
        return None


def holds_weights_alone(folder: Path, step: int) -> bool:
    """Whether the checkpoint of `step` below `folder` was converted, and so has no optimizer to go on with."""
    try:
        return _parse_state(step_folder(folder, step)).get("weights_only") is True
    except CheckpointError:
        return False


def read_counters(folder: Path, step: int) -> dict[str, Any]:
    """The counters of the checkpoint of `step` below `folder`, without loading it. Collective.

    Raises:
        CheckpointError: on all ranks, if files are missing or damaged.
    """
    return read_state(step_folder(folder, step))["counters"]


def saved_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints below `folder`, ascending; one that is being written has another name still."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in names if match)


def make_room(partial: Path) -> None:
    """Make the empty folder of a new checkpoint; remove what saves that broke off and slow removals have left."""
    for leftover in partial.parent.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)


def finish(partial: Path, final: Path, state: dict[str, Any], checksums: Mapping[str, str]) -> None:
    """Add what is no tensor, sizes and `checksums` of the files that hold tensors, and move the whole to its place."""
    files = {name: {"size": size, "checksum": checksums[name]} for name, size in _sizes(partial).items()}
    state |= {"format": _FORMAT, "files": files}
    with open(partial / _STATE_FILE, "w") as file:
        file.write(to_checked_json(state, lines=True))
        file.flush()
        os.fsync(file.fileno())
    replace_folder(partial, final)


def replace_folder(partial: Path, final: Path) -> None:
    """Move a whole folder to its place; what was there is removed when it stands."""
    replaced = set_aside(final) if final.exists() else None
    partial.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a folder that is to be removed, so that what is left of it is never taken for a whole one."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def read_state(folder: Path) -> dict[str, Any]:
    """What `finish` wrote, with every tensor file in its place. Collective.

    Raises:
        CheckpointError: on all ranks, if it is damaged or a file is missing or of another size.
        OtherFormatError: likewise, if another version has written it.
    """
    state, error = {}, None
    try:
        state = _parse_state(folder)
        if problem := _files_problem(state["files"], folder):
            error = CheckpointError(f"checkpoint {folder}: {problem}")
    except CheckpointError as caught:
        error = caught
    raise_together(error)
    return state


def _parse_state(folder: Path) -> dict[str, Any]:
    """What `finish` wrote. Raises CheckpointError."""
    try:
        text = (folder / _STATE_FILE).read_bytes()
        state, damage = json.loads(text), ""
        try:
            state = parse_checked_json(text)
        except ValueError as error:
            damage = str(error)
    except (OSError, ValueError, RecursionError) as caught:
        raise CheckpointError(f"checkpoint {folder}: cannot read {_STATE_FILE}: {caught}") from None
    found = state.get("format") if isinstance(state, dict) else None
    # What an older version wrote has no checksum at its end.
    if found != _FORMAT and not (damage and isinstance(state, dict) and "checksum" in state):
        error = f"checkpoint {folder}: {_STATE_FILE} has format {found!r}; this version reads {_FORMAT}"
        raise (OtherFormatError if type(found) is int else CheckpointError)(error)
    if damage:
        raise CheckpointError(f"checkpoint {folder}: cannot read {_STATE_FILE}: {damage}")
    if problem := _state_problem(state, folder):
        raise CheckpointError(f"checkpoint {folder}: {problem}")
    return state


def _state_problem(state: dict[str, Any], folder: Path) -> str:
    kinds = {"step": int, "world_size": int, "random_states": list, "counters": dict, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            return f"{_STATE_FILE}: {key} is {state.get(key)!r}, not of type {kind.__name__}"
    for name, about in state["files"].items():
        if not isinstance(about, dict) or {type(about.get("size")), type(about.get("checksum"))} != {int, str}:
            return f"{_STATE_FILE}: files has {about!r} for {name}, not its size and checksum"
    if folder.name != step_folder(folder, state["step"]).name:
        return f"{_STATE_FILE} is of step {state['step']}"
    return ""


def _files_problem(files: dict[str, Any], folder: Path) -> str:
    """What is wrong with the tensor files that there are. Names are compared, and never followed elsewhere."""
    try:
        sizes = _sizes(folder)
    except OSError as error:
        return f"cannot read {error.filename or folder}: {error.strerror}"
    for name, about in files.items():
        size = about["size"]
        if sizes.get(name) != size:
            return f"{name} has {sizes[name]} bytes, not {size}" if name in sizes else f"{name} is missing"
    foreign = sizes.keys() - files.keys()
    return f"{min(foreign)} is not of this checkpoint" if foreign else ""
