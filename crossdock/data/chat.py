"""Conversations to tokens: rendered by the tokenizer's chat template, and which of the tokens the assistant wrote.

The text is that of transformers' `apply_chat_template`, and so are the tokens, but for one thing: a special token that
someone else than the assistant spells out is plain text, as in all other data.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Encoding, Tokenizer

from crossdock.data.config import DataError, TrainOn
from crossdock.data.conversations import ASSISTANT, Conversation
from crossdock.data.spans import Span, assistant_spans
from crossdock.data.tokenizer import vocabulary_size

__all__ = ["ChatEncoder", "ChatTokenizer", "check_chat_template", "identify_chat", "read_chat_template"]

_TEMPLATE_FILE: Final = "chat_template.jinja"
_TEMPLATES_FOLDER: Final = "additional_chat_templates"
_CONFIG_FILE: Final = "tokenizer_config.json"
# What a tokenizer and its template are made of, beside tokenizer.json.
_FILES: Final = (_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", _TEMPLATE_FILE, "chat_template.json")
_CONVERSATIONS_PER_ENCODING: Final = 32


class ChatTokenizer:
    """The tokenizer of a folder, as `AutoTokenizer` opens it, with its chat template, or `template` in its place.

    Raises DataError for a folder that transformers can't open, and for one without a template.
    """

    def __init__(self, folder: Path, template: str | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            # Code that a folder brings along is never run, and nobody is asked whether it may.
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # Of the file, of its class, of transformers: there is no common one.
            raise DataError(f"{folder}: transformers can't open its tokenizer ({error})") from error
        if template is None and not tokenizer.chat_template:
            raise _no_template(folder)
        if not tokenizer.is_fast:
            raise DataError(f"{folder}: its tokenizer tells no places of tokens; it needs one with a tokenizer.json")
        self._tokenizer, self._template = tokenizer, template
        self.vocab_size = vocabulary_size(tokenizer.backend_tokenizer)
        self.end_of_text_id: int | None = tokenizer.eos_token_id
        self._encoder, self._plain_encoder = (_encoder(tokenizer.backend_tokenizer) for _ in range(2))
        self._plain_encoder.encode_special_tokens = True
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special_ids = {number for token in special if (number := self._encoder.token_to_id(token)) is not None}
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or "(?!)")

    def render(self, conversation: Conversation, messages: list[dict[str, Any]], **options: Any) -> str:
        """The text of some `messages` in the place of the conversation's. Raises DataError where the template does."""
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=conversation.tools, chat_template=self._template, tokenize=False, **options
            )
        except Exception as error:  # Whatever the template raises: it is a program.
            raise DataError(f"{conversation.place}: the chat template refuses it ({error})") from error

    def encode(self, conversations: list[Conversation], train_on: TrainOn) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields each one's ids `[n]` int64, and `[n]` bool: which of them are to be predicted.

        Raises DataError with file and line for one that the template refuses or whose assistant's part can't be told.
        """
        rendered = [self._rendered(conversation, conversation.messages) for conversation in conversations]
        encodings = self._encoder.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        for conversation, (text, spelled), encoding in zip(conversations, rendered, encodings, strict=True):
            ids, starts, ends = self._as_text(conversation, text, spelled, encoding)
            if train_on == "all":
                yield ids, np.ones(len(ids), dtype=bool)
                continue
            is_special = np.isin(ids, list(self._special_ids))
            special_ends = ends[is_special].tolist()
            predicted = np.zeros(len(ids), dtype=bool)
            spans = assistant_spans(self, conversation, text, special_ends, last=train_on == "last")
            for start, end in spans:  # A token belongs to the part in which it begins.
                predicted |= (starts >= start) & (starts < end)
            if not predicted[1:].any():
                raise DataError(f"{conversation.place}: the chat template shows nothing of what the assistant says")
            yield ids, predicted

    def prompt(self, text: str) -> list[int]:
        """The tokens up to where the assistant begins its answer to the user's `text`."""
        messages = [{"role": "user", "content": text}]
        conversation = Conversation(messages, None, "the prompt")
        rendered, spelled = self._rendered(conversation, messages, add_generation_prompt=True)
        encoding = self._encoder.encode(rendered, add_special_tokens=False)
        return self._as_text(conversation, rendered, spelled, encoding)[0].tolist()

    def generation_spans(self, conversation: Conversation, text: str) -> list[Span] | None:
        """Where the template's own `{% generation %}` tags are in `text`; None where it has none."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(self._template, conversation.tools)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        render: Any = render_jinja_template  # Its annotations say less than it returns.
        (rendered,), (spans,) = render(
            [conversation.messages],
            tools=conversation.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        if rendered != text:
            raise DataError(f"{conversation.place}: the chat template renders another text each time")
        return [Span(*span) for span in spans]

    def _rendered(
        self, conversation: Conversation, messages: list[dict[str, Any]], **options: Any
    ) -> tuple[str, list[Span]]:
        """The text of messages, and where others than the assistant have spelled special tokens out in it."""
        text = self.render(conversation, messages, **options)
        others = [message for message in messages if message["role"] != ASSISTANT]
        if not any(self._special.search(message["content"]) for message in others):
            return text, []
        written = json.dumps(messages, ensure_ascii=False) + text
        mark = next(character for character in map(chr, range(0xE000, 0xF900)) if character not in written)
        marked = [
            message | {"content": self._special.sub(rf"{mark}\g<0>{mark}", message["content"])}
            if message["role"] != ASSISTANT
            else message
            for message in messages
        ]
        pieces = self.render(conversation, marked, **options).split(mark)
        if "".join(pieces) != text or len(pieces) % 2 == 0:
            raise self._spelled_out(conversation)
        bounds = np.cumsum([0, *map(len, pieces)]).tolist()
        return text, [Span(bounds[index], bounds[index + 1]) for index in range(1, len(pieces), 2)]

    def _as_text(
        self, conversation: Conversation, text: str, spelled: list[Span], encoding: Encoding
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids `[n]` of a text, with special tokens at `spelled` as plain text, and where in it each begins and ends.

        Special tokens cut a text before anything else: what is between two of them is encoded alone.
        """
        ids, offsets = encoding.ids, encoding.offsets
        if spelled:
            kept = [
                (token, place)
                for token, place in zip(ids, offsets, strict=True)
                if token in self._special_ids and not any(place[0] < end and place[1] > start for start, end in spelled)
            ]
            if self._in_pieces(self._encoder, text, kept)[0] != ids:  # Not so with this tokenizer.
                raise self._spelled_out(conversation)
            ids, offsets = self._in_pieces(self._plain_encoder, text, kept)
        places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(ids, dtype=np.int64), places[:, 0], places[:, 1]

    def _in_pieces(
        self, encoder: Tokenizer, text: str, kept: list[tuple[int, tuple[int, int]]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and places of a text of which the tokens `kept` are known."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0
        for token, place in [*kept, (None, (len(text), len(text)))]:
            piece = encoder.encode(text[begin : place[0]], add_special_tokens=False)
            ids += piece.ids
            offsets += [(start + begin, end + begin) for start, end in piece.offsets]
            if token is not None:
                ids.append(token)
                offsets.append(place)
            begin = place[1]
        return ids, offsets

    def _spelled_out(self, conversation: Conversation) -> DataError:
        return DataError(
            f"{conversation.place}: a message spells out a special token, which this tokenizer and chat template can't "
            "take as plain text; take it out"
        )


class ChatEncoder:
    """Conversations to token ids and targets, as `Encoder` does texts; nothing is put between conversations."""

    def __init__(self, tokenizer: ChatTokenizer, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._train_on: TrainOn = train_on
        self.end_of_text_id: int | None = None
        self.vocab_size = tokenizer.vocab_size
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def encode(self, documents: Iterable[Conversation]) -> Iterator[tuple[Conversation, np.ndarray, np.ndarray]]:
        """Yields each conversation with its ids `[n]`, of `dtype`, and its targets `[n]` bool, in order."""
        remaining = iter(documents)
        while group := list(islice(remaining, _CONVERSATIONS_PER_ENCODING)):
            for conversation, (ids, targets) in zip(group, self._tokenizer.encode(group, self._train_on), strict=True):
                yield conversation, ids.astype(self.dtype), targets


def read_chat_template(path: str) -> str | None:
    """The template in a file that `data.chat_template` names; None for no name. Raises DataError."""
    if not path:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"chat template {path!r}: must be a readable file with a Jinja template ({error})") from error


def check_chat_template(folder: Path) -> None:
    """Raises DataError where a tokenizer's folder has no chat template; looks at its files alone."""
    if (folder / _TEMPLATE_FILE).is_file() or (folder / _TEMPLATES_FOLDER).is_dir():
        return
    for name in (_CONFIG_FILE, "chat_template.json"):
        try:
            if json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template"):
                return
        except (OSError, ValueError, AttributeError):
            continue
    raise _no_template(folder)


def identify_chat(folder: Path, template: str | None, train_on: TrainOn) -> list[Any]:
    """What, beside tokenizer.json and the conversations, their tokens and targets hang on, as JSON."""
    paths = [path for name in _FILES if (path := folder / name).is_file()]
    paths += sorted((folder / _TEMPLATES_FOLDER).glob("*.jinja"))
    files = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in paths]
    return ["chat", train_on, template, files, importlib.metadata.version("transformers")]


def _encoder(tokenizer: Tokenizer) -> Tokenizer:
    """The same without what cuts, pads, or moves the places of tokens: a post-processor leaves white space out."""
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.post_processor = None  # type: ignore[assignment]
    return encoder


def _no_template(folder: Path) -> DataError:
    return DataError(
        f"{folder}: has no chat template ({_TEMPLATE_FILE}, or chat_template in {_CONFIG_FILE}); "
        "data.chat_template = FILE gives one"
    )
