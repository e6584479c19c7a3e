"""Documents to tokens on disk.

`prepare_tokens` turns each source into flat files of token ids, of conversations with a mask of those that are to be
predicted, cached under a fingerprint of all that makes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import numpy as np

from crossdock.data.chat import ChatEncoder, ChatTokenizer, identify_chat, read_chat_template
from crossdock.data.config import DataConfig, DataError
from crossdock.data.conversations import Conversation, ConversationFields
from crossdock.data.fields import Fields, TextField
from crossdock.data.sources import Source, open_source
from crossdock.data.tokenizer import END_OF_TEXT, SMALLEST_VOCAB, Encoder, TextSample, read_tokenizer, train_tokenizer

__all__ = ["TokenFile", "Tokens", "prepare_tokens"]

# Part of every fingerprint: raise it when the same documents and tokenizer would give other files than before.
_FORMAT_VERSION: Final = 2
_TRAIN: Final = "train"
_HELD_OUT: Final = "held_out"


@dataclass(frozen=True)
class TokenFile:
    """A flat file of token ids, documents one after another, each followed by `end_of_text_id` (None: no separator).

    `source` is the entry of `data.source` that the documents come from. `dtype` is "uint16" or "uint32". Every id is
    below `vocab_size`, one more than the tokenizer's largest id. `documents.bin` beside it says where documents begin.
    Documents that are conversations are `masked`: `targets.bin` beside it says which tokens are to be predicted.
    """

    path: Path
    source: str
    dtype: str
    num_tokens: int
    num_documents: int
    vocab_size: int
    end_of_text_id: int | None
    masked: bool = False

    def open(self) -> np.memmap[Any, Any]:
        """The tokens `[num_tokens]`, of `dtype`, read-only and read from disk as they are used."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype), mode="r", shape=(self.num_tokens,))

    def document_offsets(self) -> np.memmap[Any, Any]:
        """`[num_documents + 1]` int64, read-only: document d is the tokens `offsets[d] .. offsets[d + 1] - 1`."""
        return np.memmap(self._documents_path, dtype=np.int64, mode="r", shape=(self.num_documents + 1,))

    def targets(self) -> np.memmap[Any, Any] | None:
        """`[num_tokens]` bool, read-only: the tokens that are to be predicted; None where all are."""
        if not self.masked:
            return None
        return np.memmap(self._targets_path, dtype=np.bool_, mode="r", shape=(self.num_tokens,))

    @property
    def _documents_path(self) -> Path:
        return self.path.with_name("documents.bin")

    @property
    def _targets_path(self) -> Path:
        return self.path.with_name("targets.bin")

    def is_whole(self) -> bool:
        """Whether all its files are there with the sizes that they should have."""
        sizes = {
            self.path: self.num_tokens * np.dtype(self.dtype).itemsize,
            self._documents_path: 8 * (self.num_documents + 1),
        }
        if self.masked:
            sizes[self._targets_path] = self.num_tokens
        return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


@dataclass(frozen=True)
class Tokens:
    """What `prepare_tokens` made: one file per source to train on, and one per source held out (none for a share 0)."""

    train: tuple[TokenFile, ...]
    held_out: tuple[TokenFile, ...]
    tokenizer_path: Path
    vocab_size: int


def prepare_tokens(config: DataConfig, tokenizer_folder: Path | None, vocab_size: int = 8192) -> Tokens:
    """The tokens of all sources, each from `cache_folder/<fingerprint>/` where it is whole there, else put there.

    The tokenizer is that of `tokenizer_folder/tokenizer.json`; for None a byte-level BPE of `vocab_size` tokens (fewer
    for very little text) is trained on the training documents of all sources, or on some 64 M characters of them. A
    special token that a document spells out is encoded as plain text. A document is held out or not by a hash of its
    text: on every machine, in every order, and in whichever source or copy it appears. Conversations are rendered and
    masked by `ChatTokenizer`, which needs `tokenizer_folder`.
    Several processes may call at once: one builds, the others wait. All documents are read once before the first is
    tokenised, so that a faulty one is found before anything is kept.

    Raises:
        DataError: for a source that is missing or faulty, a part of it that has no documents, an unreadable tokenizer,
            a chat template that is missing or does not fit the data, or a `vocab_size` below 257.
        OSError: where the cache can't be written or locked.
    """
    if tokenizer_folder is None and vocab_size < SMALLEST_VOCAB:
        raise DataError(f"vocab_size is {vocab_size}, must be at least {SMALLEST_VOCAB}: all bytes and {END_OF_TEXT}")
    if not config.source:
        raise DataError("source is empty, must name at least one")
    chat, template = config.format == "chat", read_chat_template(config.chat_template)
    if chat and tokenizer_folder is None:
        raise DataError("format is chat, which needs a tokenizer folder with a chat template")
    sources = [open_source(entry, _fields(config)) for entry in config.source]
    given_json, end_of_text = (None, END_OF_TEXT) if tokenizer_folder is None else read_tokenizer(tokenizer_folder)
    identities = [source.identity for source in sources]
    # A trained tokenizer is one of all sources, so that each one's tokens hang on the others.
    tokenizer = ["trained", vocab_size, identities] if given_json is None else ["given", end_of_text, given_json]
    if chat and tokenizer_folder is not None:
        tokenizer.append(identify_chat(tokenizer_folder, template, config.train_on))

    def make_encoder(tokenizer_json: str) -> _Encoder:
        if chat and tokenizer_folder is not None:
            return ChatEncoder(ChatTokenizer(tokenizer_folder, template), config.train_on)
        return Encoder(tokenizer_json, end_of_text)

    cache = Path(config.cache_folder).expanduser()
    folders = [cache / _fingerprint(tokenizer, config.held_out, identity) for identity in identities]
    if (present := _read_all(sources, folders)) is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache, _fingerprint(tokenizer, config.held_out, identities)):
                _build_missing(sources, folders, config.held_out, given_json, make_encoder, vocab_size)
        except OSError as error:  # A write to an open file does not name it.
            raise OSError(error.errno, error.strerror or str(error), error.filename or str(cache)) from error
        present = _read_all(sources, folders)
        assert present is not None
    return present


class _Encoder(Protocol):
    """Documents to token ids, with the targets among them: None for all."""

    dtype: str
    vocab_size: int

    @property
    def end_of_text_id(self) -> int | None: ...

    def encode(self, documents: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray, np.ndarray | None]]: ...


def _fields(config: DataConfig) -> Fields[str | Conversation]:
    if config.format == "chat":
        return ConversationFields(config.messages_field, needs_answer=config.train_on != "all")
    return TextField(config.text_field)


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT_VERSION, *parts]).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    # The cache may be shared: a link that somebody else has put there is not followed.
    descriptor = os.open(cache / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Let go when the file is closed, by a crash too.
        yield


def _build_missing(
    sources: Sequence[Source[Any]],
    folders: Sequence[Path],
    held_out: float,
    given_json: str | None,
    make_encoder: Callable[[str], _Encoder],
    vocab_size: int,
) -> None:
    """Makes the folders that are not whole. Nothing of it shows before its end; one after another is locked."""
    missing = [index for index, folder in enumerate(folders) if _read_folder(sources[index], folder) is None]
    if not missing:
        return  # Another process built them during the wait for the lock.
    samples = [TextSample((1 << 26) // len(sources)) for _ in sources]
    for index, (source, sample) in enumerate(zip(sources, samples, strict=True)):
        if index in missing or given_json is None:
            _survey(source, held_out, sample if given_json is None else None)
    tokenizer_json = given_json or train_tokenizer((text for sample in samples for text in sample), vocab_size)
    for index in missing:
        source, folder = sources[index], folders[index]
        cache, prefix = folder.parent, f".{folder.name}."
        with (
            _locked(cache, folder.name),
            tempfile.TemporaryDirectory(dir=cache, prefix=prefix, ignore_cleanup_errors=True) as scratch,
        ):
            if _read_folder(source, folder) is None:  # Else a run with this source among others built it.
                # One level down, since the temporary folder is closed to other users and the cache may be shared.
                built = Path(scratch) / folder.name
                _write_folder(built, source, held_out, tokenizer_json, make_encoder(tokenizer_json))
                shutil.rmtree(folder, ignore_errors=True)  # A broken one, which nobody reads.
                built.rename(folder)


def _survey(source: Source[Any], held_out: float, sample: TextSample | None) -> None:
    """Reads all documents, so that what is wrong with them is known, and offers those to train on to `sample`."""
    count, count_held_out, least, most = 0, 0, 1.0, 0.0
    for document in source.documents():
        share, key = _hash(document)
        count += 1
        least, most = min(least, share), max(most, share)
        if share < held_out:
            count_held_out += 1
        elif sample is not None:
            sample.add(document, key)
    if not count:
        raise DataError(f"source {source.entry!r}: holds no documents")
    if not held_out:
        return
    documents = f"the {count} documents of {source.entry!r}"
    if least == most:
        wrong = f"can't divide {source.entry!r}, which holds one document only; use 0 or more documents"
    elif not count_held_out:
        wrong = f"holds out none of {documents}; use 0 or more than {math.ceil(least * 1e6) / 1e6:.6f}"
    elif count_held_out == count:
        wrong = f"leaves none of {documents} to train on; use at most {math.floor(most * 1e6) / 1e6:.6f}"
    else:
        return
    raise DataError(f"held_out is {held_out}, which {wrong}")


def _hash(document: str | Conversation) -> tuple[float, int]:
    """Where it stands in `[0, 1)` for the share that is held out, and a key in `[0, 2^64)` independent of it."""
    text = document if isinstance(document, str) else document.key
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return (int.from_bytes(digest[:8]) >> 11) / 2**53, int.from_bytes(digest[8:])


def _write_folder(folder: Path, source: Source[Any], held_out: float, tokenizer_json: str, encoder: _Encoder) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_json.encode("utf-8"))
    parts = [_TRAIN, _HELD_OUT] if held_out else [_TRAIN]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_Writer(folder / part)) for part in parts]
        for document, ids, targets in encoder.encode(source.documents()):
            writers[_hash(document)[0] < held_out].add(ids, targets)
    description = {"dtype": encoder.dtype, "vocab_size": encoder.vocab_size, "end_of_text_id": encoder.end_of_text_id}
    description |= {"fingerprint": folder.name}
    description |= {
        part: {"num_tokens": writer.num_tokens, "num_documents": writer.num_documents, "masked": writer.masked}
        for part, writer in zip(parts, writers, strict=True)
    }
    (folder / "tokens.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


class _Writer:
    """Appends documents to the files of a part: to two, and to a third where there are targets."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.num_tokens = self.num_documents = 0
        self.masked = False
        self._folder = folder
        self._targets: BinaryIO | None = None
        self._tokens = (folder / "tokens.bin").open("wb")
        self._offsets = (folder / "documents.bin").open("wb")
        self._offsets.write(np.int64(0).tobytes())

    def add(self, ids: np.ndarray, targets: np.ndarray | None) -> None:
        self._tokens.write(ids.tobytes())
        if targets is not None:
            if self._targets is None:
                self._targets = (self._folder / "targets.bin").open("wb")
                self.masked = True
            self._targets.write(targets.tobytes())
        self.num_tokens += len(ids)
        self.num_documents += 1
        self._offsets.write(np.int64(self.num_tokens).tobytes())

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._offsets, self._targets):
            if file is not None:
                file.close()


def _read_folder(source: Source[Any], folder: Path) -> list[TokenFile] | None:
    """The token files in a source's folder, the held-out one last; None where they are not all there and whole."""
    try:
        description = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        shared = {name: description[name] for name in ("dtype", "vocab_size", "end_of_text_id")}
        if shared["dtype"] not in ("uint16", "uint32"):
            return None
        files = [
            TokenFile(path=folder / part / "tokens.bin", source=source.entry, **shared, **description[part])
            for part in (_TRAIN, _HELD_OUT)
            if part in description
        ]
        whole = all(file.is_whole() for file in files) and (folder / "tokenizer.json").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files if whole else None


def _read_all(sources: Sequence[Source[Any]], folders: Sequence[Path]) -> Tokens | None:
    read = [_read_folder(source, folder) for source, folder in zip(sources, folders, strict=True)]
    parts = [files for files in read if files is not None]
    if len(parts) < len(read):
        return None
    return Tokens(
        train=tuple(files[0] for files in parts),
        held_out=tuple(files[1] for files in parts if len(files) > 1),
        tokenizer_path=folders[0] / "tokenizer.json",
        vocab_size=parts[0][0].vocab_size,
    )
