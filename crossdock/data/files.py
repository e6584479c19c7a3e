"""Documents from one file: text, JSON lines, Parquet, Arrow. What is wrong with it is one DataError with its place."""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from crossdock.data.config import DataError

__all__ = [
    "SUFFIXES",
    "can_read",
    "first_line",
    "need_package",
    "read_documents",
    "table_texts",
]

_ROWS_PER_READ: Final = 256


def can_read(path: Path) -> bool:
    """Whether the file's name ends in one of `SUFFIXES`, in small or capital letters."""
    return path.name.lower().endswith(SUFFIXES)


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yields the documents of a file in order, a line or a group of rows at a time; empty ones are left out.

    Args:
        path: a `.txt` is one document; `.jsonl`, `.jsonl.gz` and `.json-lines` have one per line, `.parquet` and
            `.arrow` (an Arrow stream) one per row.
        text_field: the field or column with the text.

    Raises:
        DataError: naming file and line (or row), for a file that is missing, empty, binary, truncated or malformed.
    """
    found = False
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}:1: the file is empty")
        for text in _reader(path)(path, text_field):
            if text:
                found = True
                yield text
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from error
    if not found:
        raise DataError(f"{path}: holds no documents, only empty ones or none at all")


def need_package(name: str, purpose: str) -> None:
    """Raises DataError with the way to install it where the optional package `name` is missing."""
    if importlib.util.find_spec(name) is None:
        raise DataError(f"{purpose} needs the package {name}: pip install 'crossdock[datasets]'")


def table_texts(tables: Iterable[Any], columns: Sequence[str], text_field: str, place: str) -> Iterator[str]:
    """Yields the strings in column `text_field` of Arrow tables or record batches; the rows at `place` count from 1."""
    if text_field not in columns:
        held = ", ".join(columns)
        raise DataError(f"{place}: has no column {text_field!r} but {held}; data.text_field names the one to read")
    row = 0
    for table in tables:
        for value in table.column(text_field):
            row += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{place}, row {row}: {text_field!r} is not valid UTF-8") from error
            if not isinstance(text, str):
                raise DataError(f"{place}, row {row}: {text_field!r} is {_shown(text)}, must be a string")
            yield text


def first_line(error: Exception) -> str:
    """What another package says of its error, short enough for one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _text_file(path: Path, text_field: str) -> Iterator[str]:
    yield _decode(path.read_bytes(), path, 1)  # read_text would translate the ends of lines.


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
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
            raise DataError(f"{place}: is {_shown(value)}, must be a JSON object with the field {text_field!r}")
        if text_field not in value:
            held = ", ".join(map(repr, value)) or "none at all"
            raise DataError(f"{place}: has no field {text_field!r} but {held}; data.text_field names the one to read")
        text = value[text_field]
        if not isinstance(text, str):
            raise DataError(f"{place}: the field {text_field!r} is {_shown(text)}, must be a string")
        if "\\u" in line:  # Only an escape can smuggle half a character in.
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(f"{place}: the field {text_field!r} has half a surrogate pair") from error
        yield text


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    need_package("pyarrow", f"reading {path}")
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            wanted = [text_field] if text_field in columns else []
            yield from table_texts(file.iter_batches(_ROWS_PER_READ, columns=wanted), columns, text_field, str(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: truncated, or no Parquet file ({first_line(error)})") from error


def _arrow(path: Path, text_field: str) -> Iterator[str]:
    """A file of `datasets.save_to_disk`: an Arrow stream."""
    need_package("pyarrow", f"reading {path}")
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            yield from table_texts(stream, stream.schema.names, text_field, str(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: truncated, or no stream of Arrow data ({first_line(error)})") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line with its end) of a plain or gzip-compressed file."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except EOFError as error:
        raise DataError(f"{path}:{number + 1}: the compressed data breaks off here: the file is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: is not valid gzip data ({error})") from error


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


def _shown(value: object) -> str:
    """A JSON value in a message."""
    written = json.dumps(value, default=str)
    return written if len(written) <= 40 else f"{written[:40]}..."


_READERS: Final[Mapping[str, Callable[[Path, str], Iterator[str]]]] = {
    ".txt": _text_file,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json-lines": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}

# Endings of the files that may be named as a source or lie in a folder that is one.
SUFFIXES: Final = tuple(suffix for suffix in _READERS if suffix != ".arrow")


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    name = path.name.lower()
    return next(reader for suffix, reader in _READERS.items() if name.endswith(suffix))
