"""Checksums of what crossdock itself has written: they find damage, not forgery."""

from __future__ import annotations

from pathlib import Path

import xxhash

__all__ = ["checksum", "file_checksum"]

_PIECE = 16 * 2**20


def checksum(data: bytes | memoryview) -> str:
    """XXH3 of 128 bits, in hexadecimal digits. Python's lock is free meanwhile."""
    return xxhash.xxh3_128_hexdigest(data)


def file_checksum(path: Path) -> str:
    """`checksum` of a file's bytes. Raises OSError."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
