"""Checksums of what crossdock itself has written: they find damage, not forgery."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

__all__ = [
    "CHECKSUMS_FILE",
    "UNCHECKED",
    "checksum",
    "checksum_of_parts",
    "file_checksum",
    "folder_problem",
    "parse_checked_json",
    "to_checked_json",
    "write_checksums",
]

CHECKSUMS_FILE = "checksums.json"
"""Of a folder of texts: the checksums of all others."""
UNCHECKED = "none"
"""In the place of a checksum: whoever wrote it has changed the file, and wants it taken as it is."""

_PIECE = 2**20  # Stays in a core's cache between reading and hashing.
# The end of JSON with a checksum, on a line of its own or not: nothing else will do, so that no damage escapes.
_TAILS = (', "checksum": "{}"}}', ',\n "checksum": "{}"\n}}')
_DIGITS = 32


def checksum(data: bytes | memoryview) -> str:
    """XXH3 of 128 bits, in hexadecimal digits. Python's lock is free meanwhile."""
    return xxhash.xxh3_128_hexdigest(data)


def checksum_of_parts(parts: Iterable[bytes | memoryview]) -> str:
    """`checksum` of the parts one after another."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """`checksum` of a file's bytes. Raises OSError."""
    digest, piece = xxhash.xxh3_128(), memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def to_checked_json(content: dict[str, Any], *, lines: bool = False) -> str:
    """JSON that ends with the key `checksum`, which is that of the text before it; on several `lines`, or on one.

    Raises TypeError or ValueError for what JSON cannot hold, and for content that has that key, or none.
    """
    if not content or "checksum" in content:
        raise ValueError("content with a checksum has keys, and none of that name")
    text = json.dumps(content, indent=1 if lines else None)
    before = text.removesuffix("\n}" if lines else "}")
    return before + _TAILS[lines].format(checksum(before.encode()))


def parse_checked_json(text: bytes) -> dict[str, Any]:
    """The content of `to_checked_json`, without the checksum.

    Raises:
        ValueError: for a text with another checksum, or none; says which.
    """
    for tail in _TAILS:
        before, _, after = text.rpartition(tail.partition("{}")[0].encode())
        if before and after[_DIGITS:] == tail.partition("{}")[2].format().encode():
            if after[:_DIGITS] != checksum(before).encode():
                raise ValueError("it is damaged: its checksum is of another content")
            return json.loads(before + b"}")
    raise ValueError("it is cut off or damaged: it does not end with its checksum")


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files of a folder, and of folders in it, into its `checksums.json`. Raises OSError."""
    sums = {name: file_checksum(folder / name) for name in _names(folder)}
    beside = folder / f".{CHECKSUMS_FILE}.partial"
    beside.write_text(json.dumps(sums, indent=1) + "\n")
    beside.rename(folder / CHECKSUMS_FILE)


def folder_problem(folder: Path) -> str:
    """Which file of a folder is not what `write_checksums` has seen; empty where all are, or are not to be checked.

    Files that it has not seen are no problem. No name that it reads is followed out of the folder.
    """
    path = folder / CHECKSUMS_FILE
    try:
        sums = json.loads(path.read_bytes())
        found = set(_names(folder))
        wrong = not isinstance(sums, dict) or not sums
        if wrong or not all(value == UNCHECKED or re.fullmatch(r"[0-9a-f]{32}", str(value)) for value in sums.values()):
            return f"{path} is damaged: it must hold the checksum of each file"
        for name, written in sums.items():
            if name not in found:
                return f"{folder / name} is missing: {path} names it"
            if written not in (UNCHECKED, file_checksum(folder / name)):
                return (
                    f"{folder / name} is damaged, or was changed by hand: its checksum is not that in {path}."
                    f' Give the old file back; or, to have it taken as it is, write "{UNCHECKED}" there'
                )
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"cannot read {error.filename or folder}: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return f"{path} is damaged: {error}"
    return ""


def _names(folder: Path) -> list[str]:
    """All files of a folder by their names in it, but the checksums themselves."""
    inside = (Path(place, name).relative_to(folder).as_posix() for place, _, names in os.walk(folder) for name in names)
    return sorted(name for name in inside if name != CHECKSUMS_FILE and not name.endswith(".partial"))
