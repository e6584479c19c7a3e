"""Rows: which tokens of a token file make one row of a batch, and the tensors of some of them.

A row is a stretch of at most S + 1 tokens of the file: S inputs and, one further, S labels. What a shorter one leaves
is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from crossdock.data.config import DataError, Packing
from crossdock.data.tokens import TokenFile

__all__ = ["IGNORED_LABEL", "Batch", "DocumentRows", "Rows", "StreamRows", "TooLong", "pack", "read_rows"]

# The label of a position where nothing is predicted; what torch's cross entropy leaves out by default.
IGNORED_LABEL: Final = -100
"""The label of a token that is not predicted, as in `torch.nn.functional.cross_entropy`."""

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank: `labels[i, t]` is the token after `input_ids[i, t]`, or -100: nothing to predict.

    `position_ids`, where attention stays within documents, start again at 0 with each document of a row, and with the
    padding; transformers keeps documents apart by them, without an attention mask. `padding_mask` is true at padding,
    which is at the ends of rows: input 0, label -100. It is None where rows are never padded.
    """

    input_ids: torch.Tensor  # [B, S] int64
    labels: torch.Tensor  # [B, S] int64
    position_ids: torch.Tensor | None = None  # [B, S] int64
    padding_mask: torch.Tensor | None = None  # [B, S] bool

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.input_ids.numel() - (0 if self.padding_mask is None else int(self.padding_mask.sum()))

    def section(self, index: int, count: int) -> Batch:
        """Of every row the `index`-th of `count` sections of equal length, for ranks that share sequences.

        Raises DataError where they would not be equal.
        """
        seq_len = self.input_ids.shape[1]
        if seq_len % count:
            raise DataError(f"seq_len is {seq_len}, must be a multiple of the {count} ranks that share a sequence")
        columns = slice(index * seq_len // count, (index + 1) * seq_len // count)
        return Batch(**{name: tensor[:, columns] for name, tensor in self.inputs(self.input_ids.device).items()})

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What there is of it, by name, on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class StreamRows:
    """Windows: row w is the tokens `w*S .. (w+1)*S`, S + 1 of them, wherever documents end.

    The rest at the end of the file, shorter than a window, is the last row `with_rest`, else no row.
    """

    tokens: TokenFile
    seq_len: int
    with_rest: bool = False

    def __len__(self) -> int:
        predicted = max(0, self.tokens.num_tokens - 1)
        return -(-predicted // self.seq_len) if self.with_rest else predicted // self.seq_len

    def spans(self, rows: _Array) -> tuple[_Array, _Array]:
        """Where `rows` `[N]` begin in the file and where they end, one past the last token."""
        starts = rows * self.seq_len
        return starts, np.minimum(starts + self.seq_len + 1, self.tokens.num_tokens)


class DocumentRows:
    """Rows of whole documents: in order of the file, as many as fit; one that does not fit begins the next row.

    A document of more than S + 1 tokens is cut into rows that share one token, the last label of one being the first
    input of the next; its rest begins a row like a document. Single tokens, which predict nothing, make no row. A
    conversation is shortened instead, to its first S + 1 tokens, or left out where none of these is to be predicted.
    Needs 16 bytes per row.
    """

    def __init__(self, tokens: TokenFile, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        starts, ends = _shortened(tokens, seq_len) if tokens.masked else _pieces(tokens.document_offsets(), seq_len)
        after = np.searchsorted(ends, starts + seq_len + 1, side="right")  # The piece that begins the row after.
        following, first, piece = after.tolist(), [], 0
        while piece < len(following):
            first.append(piece)
            piece = following[piece]
        chosen = np.array(first, dtype=np.int64)
        self._starts, self._ends = starts[chosen], ends[after[chosen] - 1]
        useful = self._ends - self._starts > 1
        self._starts, self._ends = self._starts[useful], self._ends[useful]

    def __len__(self) -> int:
        return len(self._starts)

    def spans(self, rows: _Array) -> tuple[_Array, _Array]:
        """Where `rows` `[N]` begin in the file and where they end, one past the last token."""
        return self._starts[rows], self._ends[rows]


Rows = StreamRows | DocumentRows


def pack(tokens: TokenFile, seq_len: int, packing: Packing, *, with_rest: bool = False) -> Rows:
    """The rows of a file, `with_rest` the last one of a stream too. Raises DataError where there are none."""
    rows = DocumentRows(tokens, seq_len) if packing == "documents" else StreamRows(tokens, seq_len, with_rest)
    if not len(rows) and tokens.masked:
        wanted = "raise it until there is room for an answer"
        raise DataError(f"seq_len is {seq_len}, too small for every conversation of {tokens.source!r}: {wanted}")
    if not len(rows):
        held = f"the {tokens.num_tokens} tokens of {tokens.source!r} ({tokens.path})"
        raise DataError(f"seq_len is {seq_len}, must be below {held}: lower it or use more text")
    return rows


def read_rows(
    sources: Sequence[Rows], source_ids: _Array, row_ids: _Array, *, within_documents: bool, padded: bool
) -> Batch:
    """The tensors of N rows.

    Args:
        sources: all of one `seq_len`.
        source_ids: `[N]`, which of `sources` a row is from.
        row_ids: `[N]`, the row of that source; -1 for one that is padding from end to end.
        within_documents: attention stays within documents, and a document's first token is not predicted.
        padded: some rows may be shorter than `seq_len`.
    """
    seq_len = sources[0].seq_len
    token_ids = np.zeros((len(row_ids), seq_len + 1), dtype=np.int64)
    targets = np.zeros(len(row_ids), dtype=np.int64)  # How many positions predict; behind them there is padding.
    positions = np.tile(np.arange(seq_len), (len(row_ids), 1))
    new_document = np.zeros((len(row_ids), seq_len), dtype=bool)  # Whether the label begins one.
    masked = np.zeros((len(row_ids), seq_len), dtype=bool)  # Whether the label is not to be predicted.
    for index, source in enumerate(sources):
        mine = (source_ids == index) & (row_ids >= 0)
        if not mine.any():
            continue
        starts, ends = source.spans(row_ids[mine])
        where = np.minimum(starts[:, None] + np.arange(seq_len + 1), ends[:, None] - 1)
        token_ids[mine] = own = source.tokens.open()[where]
        _check_ids(own, source.tokens)
        targets[mine] = ends - starts - 1
        if (to_predict := source.tokens.targets()) is not None:
            masked[mine] = ~to_predict[where[:, 1:]]
        if within_documents:
            offsets = source.tokens.document_offsets()
            documents = np.searchsorted(offsets, where, side="right") - 1
            new_document[mine] = documents[:, 1:] != documents[:, :-1]
            begins = np.maximum(offsets[documents[:, :-1]], starts[:, None])
            positions[mine] = where[:, :-1] - begins
    inputs, labels = token_ids[:, :-1].copy(), token_ids[:, 1:].copy()
    labels[new_document | masked] = IGNORED_LABEL
    padding = np.arange(seq_len) >= targets[:, None]
    if padded:
        inputs[padding], labels[padding] = 0, IGNORED_LABEL
        positions = np.where(padding, np.arange(seq_len) - targets[:, None], positions)
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(labels),
        torch.from_numpy(positions) if within_documents else None,
        torch.from_numpy(padding) if padded else None,
    )


def _check_ids(ids: _Array, tokens: TokenFile) -> None:
    """Raises DataError for ids that the vocabulary has not: a model would fail on them, on a GPU for good."""
    if (largest := int(ids.max(initial=0))) >= tokens.vocab_size:
        raise DataError(
            f"{tokens.path} is damaged: it holds the token {largest}, beyond its vocabulary of {tokens.vocab_size}; "
            f"remove the folder {tokens.path.parent.parent}, and the tokens of {tokens.source!r} are made anew"
        )


class TooLong(NamedTuple):
    """How many conversations do not fit a row, and how many of these have none of their answers in it."""

    conversations: int
    without_answer: int

    @classmethod
    def of(cls, files: Sequence[TokenFile], seq_len: int) -> TooLong:
        """Of the conversations in some token files; documents that are none do not count."""
        counts = np.zeros(2, dtype=int)
        for tokens in files:
            if tokens.masked:
                longer = np.flatnonzero(np.diff(tokens.document_offsets()) > seq_len + 1)
                counts += len(longer), len(longer) - int(_answered(tokens, longer, seq_len).sum())
        return cls(*counts.tolist())

    def __str__(self) -> str:
        return (
            f"{self.conversations:,} conversations are longer than a row: their ends are cut off, and "
            f"{self.without_answer:,} of them are left out, of which no answer would remain"
        )


def _shortened(tokens: TokenFile, seq_len: int) -> tuple[_Array, _Array]:
    """Where conversations begin, and where they end or are cut off; those without a target in between are left out."""
    offsets = tokens.document_offsets()
    lengths = np.diff(offsets)
    kept = lengths > 0
    longer = np.flatnonzero(lengths > seq_len + 1)
    kept[longer] = _answered(tokens, longer, seq_len)
    starts = offsets[:-1][kept]
    return starts, starts + np.minimum(lengths[kept], seq_len + 1)


def _answered(tokens: TokenFile, documents: _Array, seq_len: int) -> _Array:
    """Whether there is something to predict in the first S + 1 tokens of some documents, longer than that, `[N]`."""
    offsets, targets = tokens.document_offsets(), tokens.targets()
    assert targets is not None
    starts = offsets[documents]
    return np.array([targets[start + 1 : start + seq_len + 1].any() for start in starts.tolist()], dtype=bool)


def _pieces(offsets: _Array, seq_len: int) -> tuple[_Array, _Array]:
    """Where documents, and the rows of those that are longer than a row, begin and end; empty ones are left out."""
    lengths = np.diff(offsets)
    begins, lengths = offsets[:-1][lengths > 0], lengths[lengths > 0]
    counts = np.maximum(1, -(-(lengths - 1) // seq_len))
    # Number of a piece within its document.
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + numbers * seq_len
    return starts, np.minimum(starts + seq_len + 1, np.repeat(begins + lengths, counts))
