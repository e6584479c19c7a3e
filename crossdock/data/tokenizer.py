"""The tokenizer: given as a folder, or trained on the documents; and documents to token ids with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from crossdock.data.config import DataError

__all__ = [
    "END_OF_TEXT",
    "SMALLEST_VOCAB",
    "Encoder",
    "TextSample",
    "open_tokenizer",
    "read_tokenizer",
    "train_tokenizer",
    "vocabulary_size",
]

END_OF_TEXT: Final = "<|endoftext|>"
SMALLEST_VOCAB: Final = 257  # The byte alphabet and the end-of-text token.
# Bounded, since an encoding takes far more memory than the ids that are kept of it.
_TEXTS_PER_ENCODING: Final = 32
_CHARACTERS_PER_ENCODING: Final = 1 << 20


class TextSample:
    """Texts to train a tokenizer on, in the order in which they came: all, or of more than `max_characters` a sample.

    A text is in the sample where its key is below a bound that falls as texts come: the same texts, the same sample.
    """

    def __init__(self, max_characters: int = 1 << 26) -> None:
        self._max_characters = max_characters
        self._kept: list[tuple[int, str]] = []
        self._characters = 0
        self._below: int | None = None  # Texts with this key or a higher one are out.

    def add(self, text: str, key: int) -> None:
        """Offer a text; `key` is a hash of it, uniform over some range."""
        if self._below is not None and key >= self._below:
            return
        text = text[: self._max_characters]
        self._kept.append((key, text))
        self._characters += len(text)
        # Half of them go at once, so that it is not done for every text; one may always stay.
        if self._characters > self._max_characters and len(self._kept) > 1:
            keys = sorted(key for key, _ in self._kept)
            self._below = max(keys[len(keys) // 2], keys[0] + 1)
            self._kept = [(key, text) for key, text in self._kept if key < self._below]
            self._characters = sum(len(text) for _, text in self._kept)

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self._kept)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE, end-of-text being id 0; the same for the same texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def read_tokenizer(folder: Path) -> tuple[str, str | None]:
    """The content of `folder/tokenizer.json` and its end-of-text token, None where the folder names none."""
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    try:
        tokenizer_json = path.read_bytes().decode("utf-8")
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # The tokenizers package raises plain Exception for a file that it can't parse.
        raise DataError(f"can't read {path} ({error}): the tokenizer folder needs a valid tokenizer.json") from error
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        return tokenizer_json, END_OF_TEXT
    try:
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
        end_of_text = config.get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"can't read {config_path} ({error}): repair it, or remove it to have no separator") from error
    if isinstance(end_of_text, dict):  # Some hold a serialised AddedToken in place of a string.
        end_of_text = end_of_text.get("content")
    if end_of_text is not None and (not isinstance(end_of_text, str) or tokenizer.token_to_id(end_of_text) is None):
        raise DataError(f"{config_path} has the eos_token {end_of_text!r}, which {path} does not know: correct either")
    return tokenizer_json, end_of_text


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, which neither cuts nor pads. Raises DataError."""
    tokenizer = Tokenizer.from_str(read_tokenizer(folder)[0])
    # The file may carry the truncation and padding of its last use, which would cut or lengthen texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; 0 for a tokenizer without tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


class Encoder:
    """Documents to token ids, each followed by the end-of-text token where there is one.

    `vocab_size` is one more than the tokenizer's largest id, `dtype` is "uint16" where that suffices, else "uint32".
    A special token that a document spells out is encoded as plain text.
    """

    def __init__(self, tokenizer_json: str, end_of_text: str | None) -> None:
        tokenizer = Tokenizer.from_str(tokenizer_json)
        # The file may carry the truncation and padding of its last use, which would cut or lengthen documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # Else a document that spells out <|endoftext|> would be cut in two.
        self._tokenizer = tokenizer
        self.end_of_text_id = None if end_of_text is None else tokenizer.token_to_id(end_of_text)
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, documents: Iterable[str]) -> Iterator[tuple[str, np.ndarray, None]]:
        """Yields each document with its ids `[n]`, of `dtype`, in order; some documents are held at a time.

        None stands for its targets: every token is one.
        """
        separator = [] if self.end_of_text_id is None else [self.end_of_text_id]
        end = np.array(separator, dtype=self.dtype)
        for texts in _groups(documents):
            pieces = [list(_pieces(text)) for text in texts]
            encodings = self._encode_some([piece for of_text in pieces for piece in of_text])
            for text, of_text in zip(texts, pieces, strict=True):
                yield text, np.concatenate([*islice(encodings, len(of_text)), end]), None

    def _encode_some(self, texts: list[str]) -> Iterator[np.ndarray]:
        for start in range(0, len(texts), _TEXTS_PER_ENCODING):
            some = texts[start : start + _TEXTS_PER_ENCODING]
            for encoding in self._tokenizer.encode_batch_fast(some, add_special_tokens=False):
                yield np.array(encoding.ids, dtype=self.dtype)


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Some documents at a time: as many as are encoded together, fewer where they are long."""
    group: list[str] = []
    characters = 0
    for text in documents:
        if group and (len(group) == _TEXTS_PER_ENCODING or characters + len(text) > _CHARACTERS_PER_ENCODING):
            yield group
            group, characters = [], 0
        group.append(text)
        characters += len(text)
    if group:
        yield group


def _pieces(text: str) -> Iterator[str]:
    """Cuts a very long text where a line begins with no space, which tokenizers don't join to the line before.

    A whole book collection in one file would else take some fifty times its size in memory.
    """
    start = 0
    while len(text) - start > _CHARACTERS_PER_ENCODING:
        end = text.find("\n", start + _CHARACTERS_PER_ENCODING - 1) + 1
        while 0 < end < len(text) and text[end].isspace():
            end = text.find("\n", end) + 1
        if not 0 < end < len(text):
            break
        yield text[start:end]
        start = end
    yield text[start:]
