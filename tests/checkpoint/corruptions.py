"""Corruptions made up from a seed: of what we write, of users' configurations, of foreign weights.

`case(kind, number, subjects)` is the same for the same arguments. A kind is a function that draws one case; a new kind
is a further entry of `KINDS`, and `damage_file` draws what befalls a file.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from crossdock.checkpoint import CheckpointError, MemoryFiles, newest_whole, verify_checkpoint
from crossdock.config import ConfigError, load_config, validate
from crossdock.config.settings import setting_types
from crossdock.data import DataError
from crossdock.tools.opening import find_model
from crossdock.tools.report import LOAD_FILE, RANK_LOAD_FILE, LoadLog, ReportError, read_load
from crossdock.tools.report.records import read_run
from crossdock.train.keeping import run_identity
from crossdock.train.metrics import MetricsLog
from crossdock.train.trackers import Trackers

__all__ = ["KINDS", "NEWEST", "OLDER", "Case", "Subjects", "case", "damage_file", "told"]

OLDER, NEWEST = 10, 20
"""Steps of the run's checkpoints."""


class Subjects(NamedTuple):
    """What is damaged: copies of these folders.

    Attributes:
        run: of a run on two ranks with checkpoints of steps `OLDER` and `NEWEST`.
        snapshots: of another run on two ranks, with those of two steps in `memory-0`.
        single: weights in Hugging Face's format, in one file.
        sharded: the same in several files, with an index.
    """

    run: Path
    snapshots: Path
    single: Path
    sharded: Path


class Case(NamedTuple):
    """One corruption.

    Attributes:
        name: what is done, for people.
        subject: the folder that is copied; `None` for a case that makes its own files.
        damage: does it to the copy.
        find: what crossdock says of the copy; raises what is more than a message.
        names: one of these must be in what it says.
    """

    name: str
    subject: Path | None
    damage: Callable[[Path], object]
    find: Callable[[Path], str]
    names: tuple[str, ...]


def case(kind: str, number: int, subjects: Subjects) -> Case:
    """The case of a kind with this number."""
    return KINDS[kind](random.Random(f"{kind} {number}"), subjects)


def told(action: Callable[[], object]) -> str:
    """The message that `action` ends with, or nothing. What is none of our own errors would end in a traceback."""
    try:
        action()
    except (CheckpointError, ConfigError, DataError, ReportError) as error:
        return str(error)
    return ""


def damage_file(
    rng: random.Random, folder: Path, name: str, others: list[str], *, boundaries: set[int] | None = None
) -> tuple[str, Callable[[Path], object], tuple[str, ...]]:
    """Draws what befalls the file `name` of a folder: cut off, emptied, a flipped bit, a block of zeros, swapped.

    Args:
        rng: drawn from.
        folder: holds the file now.
        name: of the file, relative to the folder.
        others: files it may be swapped with.
        boundaries: lengths to which a log may be cut without a trace; others are drawn.

    Returns:
        What is done, for people; what does it to a copy of the folder; and the names of the files that change.
    """
    data = (folder / name).read_bytes()
    others = [other for other in others if (folder / other).read_bytes() != data]
    kinds = ["cut", "flip", "flip", "zeros"] + ["swap"] * bool(others) + ["empty"] * (boundaries is None)
    what = rng.choice(kinds)
    if what == "swap":
        other = rng.choice(others)

        def swap(copy: Path) -> None:
            (copy / name).rename(copy / "aside")
            (copy / other).rename(copy / name)
            (copy / "aside").rename(copy / other)

        return f"{name} swapped with {other}", swap, (name, other)
    if what in ("cut", "empty"):
        lengths = [length for length in range(1, len(data)) if length not in (boundaries or ())]
        length = 0 if what == "empty" else rng.choice(lengths)
        return f"{name} cut to {length} bytes", lambda copy: os.truncate(copy / name, length), (name,)
    place = rng.randrange(len(data))
    changed = bytearray(data)
    if what == "flip":
        bit = rng.randrange(8)
        changed[place] ^= 1 << bit
        done = f"bit {bit} of byte {place} of {name} flipped"
    else:
        while not any(changed[place : place + 64]):
            place = rng.randrange(len(data))
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
        done = f"zeros from byte {place} of {name}"
    return done, lambda copy: (copy / name).write_bytes(changed), (name,)


# Our own files.


def _checkpoint(rng: random.Random, subjects: Subjects) -> Case:
    steps = [f"checkpoint/step-{step:08d}" for step in (OLDER, NEWEST)]
    files = [[f"{step}/{path.name}" for path in sorted((subjects.run / step).iterdir())] for step in steps]
    name = rng.choice(files[1])
    if rng.random() < 0.1:
        done, act, names = f"{name} removed", lambda copy: (copy / name).unlink(), (name,)
    else:
        done, act, names = damage_file(rng, subjects.run, name, [*files[0], *files[1]])

    def find(copy: Path) -> str:
        named = told(lambda: verify_checkpoint(copy / steps[1]))
        both = any(steps[0] in each for each in names)  # A file of each checkpoint was swapped: none is whole.
        if both:
            return named
        step, messages = newest_whole(copy / "checkpoint")
        assert step == OLDER
        assert messages
        assert messages[0].startswith(named)
        return named

    return Case(done, subjects.run, act, find, tuple(Path(each).name for each in names))


def _resumed(copy: Path) -> str:
    def resume() -> None:
        config = load_config(None, ["--job.dump-folder", str(copy)])
        validate(config, 2)

    by_run = told(resume)
    by_command = told(lambda: find_model(copy))
    return by_run if by_command else ""  # Both must refuse it.


def _run_settings(rng: random.Random, subjects: Subjects) -> Case:
    others = ["metrics.jsonl", "hf_assets/config.json", "hf_assets/tokenizer.json", LOAD_FILE]
    done, act, names = damage_file(rng, subjects.run, "config.toml", others)
    return Case(done, subjects.run, act, _resumed, names)


def _assets(rng: random.Random, subjects: Subjects) -> Case:
    files = [f"hf_assets/{path.name}" for path in sorted((subjects.run / "hf_assets").iterdir())]
    name = rng.choice(files)
    if rng.random() < 0.15:
        return Case(f"{name} removed", subjects.run, lambda copy: (copy / name).unlink(), _resumed, (name,))
    done, act, names = damage_file(rng, subjects.run, name, [each for each in files if each != name])
    return Case(done, subjects.run, act, _resumed, names)


def _logs(rng: random.Random, subjects: Subjects) -> Case:
    name = rng.choice(["metrics.jsonl", LOAD_FILE, RANK_LOAD_FILE])
    path = subjects.run / name
    data = path.read_bytes()
    boundaries: set[int] = set()
    if name != "metrics.jsonl":
        _, counts, _ = read_load(path)
        size = 4 * (2 + counts[0].size)
        boundaries = set(range(20, len(data) + 1, size))  # As a run that was killed there would leave it.

    done, act, names = damage_file(
        rng, subjects.run, name, [each for each in (LOAD_FILE, "config.toml") if each != name], boundaries=boundaries
    )

    def find(copy: Path) -> str:
        shown: list[str] = []
        of_report = told(lambda: shown.extend(read_run(copy).notes)) + " ".join(shown)
        with _warnings() as warned:
            if name == "metrics.jsonl":
                MetricsLog(copy / name, NEWEST).close()
            else:
                layers, width = read_load(path)[1].shape[1:]
                LoadLog(copy / name, layers, width, NEWEST).close()
        of_run = " ".join(warned)
        cut = "cut to" in done and name == "metrics.jsonl"  # At the end of a line the report may see nothing wrong.
        return of_run if of_report or cut else ""

    return Case(done, subjects.run, act, find, names)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What is warned of within."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logger = logging.getLogger("crossdock")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def _trackers(rng: random.Random, subjects: Subjects) -> Case:
    done, act, _ = damage_file(rng, subjects.run, "trackers.json", ["metrics.jsonl"])

    def find(copy: Path) -> str:
        config = load_config(None, ["--metrics.trackers", "tensorboard"])
        with contextlib.redirect_stdout(io.StringIO()) as output:
            Trackers(config, copy, NEWEST).close()
        return output.getvalue()

    return Case(done, subjects.run, act, find, ("trackers.json",))


def _run_id(rng: random.Random, subjects: Subjects) -> Case:
    done, act, _ = damage_file(rng, subjects.run, ".run_id", ["trackers.json"])

    def find(copy: Path) -> str:
        with _warnings() as warned:
            assert run_identity(copy) != run_identity(subjects.run)
        return " ".join(warned)

    return Case(done, subjects.run, act, find, (".run_id",))


def _snapshots(rng: random.Random, subjects: Subjects) -> Case:
    def files(copy: Path) -> MemoryFiles:
        return MemoryFiles(copy / "memory-0", subjects.snapshots / "run")

    found = files(subjects.snapshots).folder.iterdir()
    names = sorted(path.relative_to(subjects.snapshots).as_posix() for path in found)
    name = rng.choice(names)
    done, act, damaged = damage_file(rng, subjects.snapshots, name, [each for each in names if each != name])

    def find(copy: Path) -> str:
        of_copy = files(copy)
        return " ".join(told(partial(of_copy.read, rank, slot)) for rank, slot, _ in of_copy.found())

    return Case(done, subjects.snapshots, act, find, tuple(Path(each).name for each in damaged))


# What users write.


def _user_config(rng: random.Random, subjects: Subjects) -> Case:
    settings = setting_types()
    name = rng.choice(sorted(settings))
    section, _, key = name.partition(".")
    kind = rng.choice(["syntax", "unknown key", "unknown section", "type", "type", "range", "range", "missing"])
    names = (name,)
    if kind == "syntax":
        text, names = _bad_syntax(rng, section, key), ("user.toml",)
    elif kind == "unknown key":
        at = rng.randrange(1, len(key))
        written = key[:at] + rng.choice("qzx") + key[at:]
        text, names = f"[{section}]\n{written} = 1\n".encode(), (f"{section}.{written}",)
    elif kind == "unknown section":
        text, names = f"[{section}q]\n{key} = 1\n".encode(), (f"{section}q",)
    elif kind == "type":
        text = f"[{section}]\n{key} = {_of_wrong_type(rng, settings[name])}\n".encode()
    elif kind == "range":
        name = rng.choice([each for each, hint in sorted(settings.items()) if _is_bounded(hint)])
        section, _, key = name.partition(".")
        text, names = f"[{section}]\n{key} = {_out_of_range(rng, settings[name])}\n".encode(), (name,)
    else:
        text, name = rng.choice(_MISSING)
        text, names = text.encode(), (name,)

    def find(copy: Path) -> str:
        return told(lambda: validate(load_config(copy / "user.toml"), 2))

    return Case(f"{kind}: {text!r}", None, lambda copy: (copy / "user.toml").write_bytes(text), find, names)


def _bad_syntax(rng: random.Random, section: str, key: str) -> bytes:
    good = f'[{section}]\n{key} = 1\n[metrics]\nproject = "a"\n'.encode()
    at = rng.randrange(len(good))
    return rng.choice(
        [
            good + b"[",
            good + b"steps",
            good + b"x = \n",
            good + b'y = "open\n',
            good + b"z = [1, 2\n",
            good + f"[{section}]\n".encode(),
            good + b'project = "again"\n',
            good[:at] + b"\xff" + good[at:],
            good[:at] + b"\0" + good[at:],
            good + b"n = 01\n",
            good + b"d = " + b"[" * 5000,
            bytes(rng.randrange(256) for _ in range(64)) + b"\xfe",
        ]
    )


def _of_wrong_type(rng: random.Random, hint: Any) -> str:
    if get_origin(hint) is tuple:
        return rng.choice(["[[1]]", "{ a = 1 }", "[{}]"])
    options = get_args(hint) if type(None) in get_args(hint) else (hint,)
    wrong = {"[1]", "{ a = 1 }", "2020-01-01", '"neither"', "1", "1.5", "true"}
    for option in options:
        if get_origin(option) is Literal:
            wrong -= {json.dumps(choice) for choice in get_args(option)}
        wrong -= {int: {"1"}, float: {"1", "1.5"}, str: {'"neither"'}, bool: {"true"}}.get(option, set())
    return rng.choice(sorted(wrong))


def _is_bounded(hint: Any) -> bool:
    options = get_args(hint) or (hint,)
    return bool({int, float} & set(options))


def _out_of_range(rng: random.Random, hint: Any) -> str:
    if float in (get_args(hint) or (hint,)):
        return rng.choice(["nan", "-inf", "inf", "-7.5", "-1e30"])
    return rng.choice(["-7", "-1000000", "-9223372036854775809"])


# Settings that need another one, and the setting that is named.
_MISSING: tuple[tuple[str, str], ...] = (
    ("[lora]\nrank = 4\n", "lora.rank"),
    ("[checkpoint]\ninitial_load_in_hf = true\n", "checkpoint.initial_load_in_hf"),
    ('[lora]\nadapter_path = "adapter"\n', "lora.adapter_path"),
    ('[data]\nformat = "chat"\n', "data.format"),
    ("[data]\nsource = []\n", "data.source"),
    ('[checkpoint]\nasync_when_busy = "skip"\n', "checkpoint.async_when_busy"),
    ('[checkpoint]\ninitial_load_path = "nowhere"\n', "checkpoint.initial_load_path"),
    ('[model]\nhf_assets_path = "nowhere"\n', "model.hf_assets_path"),
    ('[model]\nflavor = ""\nname = "mixtral"\n', "model.flavor"),
    ("[validation]\ninterval = 5\n", "validation.data"),
)


# Foreign weights: what their headers and index say.


def _foreign(rng: random.Random, subjects: Subjects) -> Case:
    sharded = rng.random() < 0.5
    subject = subjects.sharded if sharded else subjects.single
    files = sorted(path.name for path in subject.glob("*.safetensors"))
    name = rng.choice(files)

    def find(copy: Path) -> str:
        return told(lambda: find_model(copy))

    if sharded and rng.random() < 0.5:
        done, act, names = _damaged_index(rng, subject, files)
        return Case(done, subject, act, find, names)
    data = (subject / name).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    what = rng.choice(["cut", "cut in header", "grown", "length", "flip", "edit", "edit", "removed", "garbage"])
    tensors = [tensor for tensor in header if tensor != "__metadata__"]
    tensor = rng.choice(tensors)
    names = (name, tensor)
    if what == "cut":
        changed = data[: rng.randrange(8 + length, len(data))]
    elif what == "cut in header":
        changed = data[: rng.randrange(8 + length)]
    elif what == "grown":
        changed = data + bytes(rng.randrange(1, 100))
    elif what == "length":
        lengths = [0, 1, length - 1, length + 1, length // 2, len(data), 2**40, 2**63, 2**64 - 1, rng.randrange(2**64)]
        changed = struct.pack("<Q", rng.choice(lengths)) + data[8:]
    elif what == "flip":
        # What __metadata__ says means nothing, here or anywhere.
        begins = data.index(f'"{tensors[0]}"'.encode())
        place = rng.choice([*range(8), *range(begins, 8 + len(data[8 : 8 + length].rstrip()))])
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        names = (name, *tensors, *_flipped_names(bytes(changed), length))
    elif what == "edit":
        names = (name, *_edit(rng, header, tensor))
        changed = _packed(header) + data[8 + length :]
    elif what == "garbage":
        changed = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    else:
        del header[tensor]
        changed = _packed(header) + data[8 + length :]

    return Case(f"{what}: {name}", subject, lambda copy: (copy / name).write_bytes(changed), find, names)


def _flipped_names(data: bytes, length: int) -> tuple[str, ...]:
    try:
        return tuple(json.loads(data[8 : 8 + length]))
    except ValueError:
        return ()


def _packed(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _edit(rng: random.Random, header: dict[str, Any], tensor: str) -> tuple[str, ...]:
    """Change what a header says of a tensor; returns the names that a message may have."""
    about = header[tensor]
    what = rng.choice(["shape", "dims", "dtype", "unknown dtype", "offsets", "beyond", "name", "kind", "negative"])
    first, last = about["data_offsets"]
    if what == "shape":
        about["shape"][0] += rng.choice([-1, 1, 1000])
    elif what == "dims":
        about["shape"] = [*about["shape"], 2]
    elif what == "dtype":
        about["dtype"] = rng.choice(["F16", "F64", "I32", "U8"])
    elif what == "unknown dtype":
        about["dtype"] = rng.choice(["", "F33", "float32", 7, None])
    elif what == "offsets":
        about["data_offsets"] = [first + 4, last + 4]
    elif what == "beyond":
        about["data_offsets"] = [first, last + 2**40]
    elif what == "name":
        header[f"{tensor}.else"] = header.pop(tensor)
    elif what == "negative":
        about["shape"][0] = -about["shape"][0]
    else:
        header[tensor] = rng.choice([None, 3, "F32", [], {}])
    return (tensor,)


def _damaged_index(
    rng: random.Random, subject: Path, files: list[str]
) -> tuple[str, Callable[[Path], object], tuple[str, ...]]:
    name = "model.safetensors.index.json"
    index = json.loads((subject / name).read_text())
    tensor = rng.choice(sorted(index["weight_map"]))
    held = index["weight_map"][tensor]
    other = rng.choice([file for file in files if file != held])
    what = rng.choice(["outside", "elsewhere", "absent file", "unknown", "shape", "cut", "swapped", "removed", "empty"])
    text = ""
    if what == "outside":
        places = [f"../{held}", f"{subject}/{held}", "..", ".", "", f"sub/{held}", "/dev/stdin", 7, None, f"{held}\0"]
        index["weight_map"][tensor] = rng.choice(places)
    elif what == "elsewhere":
        index["weight_map"][tensor] = other
    elif what == "absent file":
        index["weight_map"][tensor] = "model-00009-of-00009.safetensors"
    elif what == "unknown":
        index["weight_map"][f"{tensor}.else"] = held
    elif what == "shape":
        index = rng.choice([[], {}, {"weight_map": []}, {"weight_map": None}, 5, "weight_map"])
    elif what == "cut":
        whole = (subject / name).read_text()
        text = whole[: rng.randrange(len(whole.rstrip()) - 1)]
    elif what == "empty":
        index["weight_map"] = {}
    names = (name, tensor, "model-00009-of-00009.safetensors")

    def act(copy: Path) -> None:
        if what == "swapped":
            (copy / held).rename(copy / "aside")
            (copy / other).rename(copy / held)
            (copy / "aside").rename(copy / other)
        elif what == "removed":
            (copy / held).unlink()
        else:
            (copy / name).write_text(text if what == "cut" else json.dumps(index))

    return f"index: {what}", act, (*names, held, other)


KINDS: Mapping[str, Callable[[random.Random, Subjects], Case]] = MappingProxyType(
    {
        "checkpoint": _checkpoint,
        "run settings": _run_settings,
        "run assets": _assets,
        "run logs": _logs,
        "run trackers": _trackers,
        "run id": _run_id,
        "snapshots": _snapshots,
        "user config": _user_config,
        "foreign weights": _foreign,
    }
)
