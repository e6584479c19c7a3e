"""Documents from one file: text, JSON lines, Parquet, Arrow. What is wrong with it is one DataError with its place."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from crossdock.data.config import DataError
from crossdock.data.fields import Fields, shown

__all__ = [
    "SUFFIXES",
    "can_read",
    "first_line",
    "need_package",
    "read_documents",
    "table_documents",
]

_ROWS_PER_READ: Final = 256
_PIECE: Final = 1 << 20  # Bytes of a long document that are read at a time.

T = TypeVar("T")


def can_read(path: Path) -> bool:
    """Whether the file's name ends in one of `SUFFIXES`, in small or capital letters."""
    return path.name.lower().endswith(SUFFIXES)


def read_documents(path: Path, fields: Fields[T]) -> Iterator[T]:
    """Yields the documents of a file in order, a line or a group of rows at a time; empty ones are left out.

    Args:
        path: a `.txt` is one document; `.jsonl`, `.jsonl.gz` and `.json-lines` have one per line, `.parquet` and
            `.arrow` (an Arrow stream) one per row.
        fields: what of a line or row is the document.

    Raises:
        DataError: naming file and line (or row), for a file that is missing, empty, binary, truncated or malformed.
    """
    found = False
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}:1: the file is empty")
        for document in _reader(path)(path, fields):
            if document:
                found = True
                yield document
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from error
    if not found:
        raise DataError(f"{path}: holds no documents, only empty ones or none at all")


def need_package(name: str, purpose: str) -> None:
    """Raises DataError with the way to install it where the optional package `name` is missing."""
    if importlib.util.find_spec(name) is None:
        raise DataError(f"{purpose} needs the package {name}: pip install 'crossdock[datasets]'")


def table_documents(tables: Iterable[Any], wanted: list[str], fields: Fields[T], place: str) -> Iterator[T]:
    """Yields the documents of Arrow tables or record batches with columns `wanted`; rows at `place` count from 1."""
    row = 0
    for table in tables:
        columns = {name: table.column(name) for name in wanted}
        for index in range(table.num_rows):
            row += 1
            values = {}
            for name, column in columns.items():
                try:
                    values[name] = column[index].as_py()
                except UnicodeDecodeError as error:
                    raise DataError(f"{place}, row {row}: {name!r} is not valid UTF-8") from error
            yield fields.of_row(values, f"{place}, row {row}")


def first_line(error: Exception) -> str:
    """What another package says of its error, short enough for one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _text_file(path: Path, fields: Fields[T]) -> Iterator[T]:
    with path.open("rb") as file:  # Text mode would translate the ends of lines.
        start, size = file.read(_PIECE), path.stat().st_size
        _decode_start(start, path)
        if size > (most := _most_bytes()):
            instead = "cut it into several files, or give one document per line of a .jsonl"
            raise DataError(f"{path}: is one document of {size / 1e9:,.1f} GB, {_beyond(most)}; {instead}")
        text = _decode(start + file.read(), path, 1)
    yield fields.of_text(text, f"{path}:1")


def _json_lines(path: Path, fields: Fields[T]) -> Iterator[T]:
    for number, raw in _lines(path):
        line, place = _decode(raw, path, number), f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not raw.endswith(b"\n"):
                raise DataError(f"{place}: the last line is cut off: the file is truncated") from error
            raise DataError(f"{place}: is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise DataError(f"{place}: is {shown(value)}, must be a JSON object")
        yield fields.of_object(value, place)


def _parquet(path: Path, fields: Fields[T]) -> Iterator[T]:
    need_package("pyarrow", f"reading {path}")
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            wanted = fields.columns(file.schema_arrow.names, str(path))
            yield from table_documents(file.iter_batches(_ROWS_PER_READ, columns=wanted), wanted, fields, str(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: truncated, or no Parquet file ({first_line(error)})") from error


def _arrow(path: Path, fields: Fields[T]) -> Iterator[T]:
    """A file of `datasets.save_to_disk`: an Arrow stream."""
    need_package("pyarrow", f"reading {path}")
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            yield from table_documents(stream, fields.columns(stream.schema.names, str(path)), fields, str(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: truncated, or no stream of Arrow data ({first_line(error)})") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line with its end) of a plain or gzip-compressed file."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while line := _read_line(file, f"{path}:{number + 1}"):
                number += 1
                yield number, line
    except EOFError as error:
        raise DataError(f"{path}:{number + 1}: the compressed data breaks off here: the file is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: is not valid gzip data ({error})") from error


def _read_line(file: Any, place: str) -> bytes:
    """The next line with its end. Of one that no memory would hold it reads no more than shows that."""
    line = file.readline(_PIECE)
    if len(line) < _PIECE or line.endswith(b"\n"):
        return line
    pieces, most = [line], _most_bytes()
    while len(pieces[-1]) == _PIECE and not pieces[-1].endswith(b"\n") and b"\0" not in pieces[-1]:
        pieces.append(file.readline(_PIECE))
        if len(pieces) * _PIECE > most:
            raise DataError(f"{place}: the line has {_beyond(most)}; give one document per line")
    return b"".join(pieces)


def _most_bytes() -> int:
    """Of one document: as text, as tokens and in between it takes several times as much."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8


def _beyond(most: int) -> str:
    return f"more than an eighth of this machine's memory ({most / 1e9:,.1f} GB)"


def _decode_start(start: bytes, path: Path) -> None:
    """Refuse a file whose first bytes are no text, before the rest is read."""
    if b"\0" in start:
        _decode(start, path, 1)


def _decode(raw: bytes, path: Path, first_line_number: int) -> str:
    """The text of bytes that begin in line `first_line_number` of the file."""

    def place(offset: int) -> str:
        lines_before = raw.count(b"\n", 0, offset)
        return f"{path}:{first_line_number + lines_before}"

    nul = raw.find(b"\0")
    if nul >= 0:
        raise DataError(f"{place(nul)}: holds a NUL byte: the file is binary, or not in UTF-8")
    try:
        return raw.decode("utf-8-sig" if first_line_number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        cut = error.end == len(raw) and "unexpected end" in error.reason
        fault = "ends within a character: the file is truncated" if cut else "is not UTF-8: the file is binary"
        raise DataError(f"{place(error.start)}: {fault}") from error


_READERS: Final[Mapping[str, Callable[[Path, Fields[Any]], Iterator[Any]]]] = {
    ".txt": _text_file,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json-lines": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}

# Endings of the files that may be named as a source or lie in a folder that is one.
SUFFIXES: Final = tuple(suffix for suffix in _READERS if suffix != ".arrow")


def _reader(path: Path) -> Callable[[Path, Fields[T]], Iterator[T]]:
    name = path.name.lower()
    return next(reader for suffix, reader in _READERS.items() if name.endswith(suffix))
