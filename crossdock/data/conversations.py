"""Conversations: what of a JSON object or a table's row is one, in the forms in which chat data comes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from crossdock.data.config import DataError
from crossdock.data.fields import held_names, shown

__all__ = ["Conversation", "ConversationFields"]

ASSISTANT: Final = "assistant"
# Fields that are read where `messages_field` is missing.
_SHARED: Final = "conversations"
_PAIR: Final = ("prompt", "completion")
_BESIDE: Final = ("system", "tools")
_ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "system": "system",
    "tool": "tool",
}
# What an assistant's message may have in the place of content.
_INSTEAD: Final = ("tool_calls", "reasoning_content")


@dataclass(frozen=True, eq=False)
class Conversation:
    """Messages, each with `role`, mostly `content`, and whatever else a chat template knows; and tools, if any.

    `place` is file and line, or row. `key` tells conversations apart.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    place: str

    @property
    def key(self) -> str:
        return json.dumps([self.messages, self.tools], ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class ConversationFields:
    """A document is the conversation in the field, or column, `messages_field`.

    Where that is missing, `conversations` (`from` and `value`, as in ShareGPT), or `prompt` and `completion`. A field
    `system` beside them is the first message, a field `tools` goes to the template. `needs_answer` refuses a
    conversation in which the assistant says nothing.
    """

    messages_field: str
    needs_answer: bool

    @property
    def identity(self) -> list[str]:
        return ["chat", self.messages_field]

    def columns(self, held: Sequence[str], place: str) -> list[str]:
        chosen = [name for name in (self.messages_field, _SHARED, *_PAIR, *_BESIDE) if name in held]
        if not set(chosen) - set(_BESIDE):
            raise self._missing(place, ", ".join(held))
        return list(dict.fromkeys(chosen))

    def of_text(self, text: str, place: str) -> Conversation:
        raise DataError(f"{place}: is plain text, which holds no conversations; data.format = text reads it")

    def of_row(self, values: Mapping[str, Any], place: str) -> Conversation:
        # A table gives every message, and every call of a tool, all keys that any of them has.
        return self.of_object(_without_nones(values), place)

    def of_object(self, values: Mapping[str, Any], place: str) -> Conversation:
        messages = _system(values.get("system"), place) + self._messages(values, place)
        if self.needs_answer and not any(message["role"] == ASSISTANT for message in messages):
            raise DataError(f"{place}: has no message of the assistant to train on")
        conversation = Conversation(messages, _tools(values.get("tools"), place), place)
        try:
            conversation.key.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: the messages have half a surrogate pair") from error
        return conversation

    def _messages(self, values: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
        for name in (self.messages_field, _SHARED):
            if name in values:
                return _checked(values[name], f"{place}: the field {name!r}")
        if not all(name in values for name in _PAIR):
            raise self._missing(place, held_names(values))
        messages: list[Any] = []
        for name, role in zip(_PAIR, ("user", ASSISTANT), strict=True):
            value = values[name]
            part = [{"role": role, "content": value}] if isinstance(value, str) else value
            messages += _checked(part, f"{place}: the field {name!r}")
        return messages

    def _missing(self, place: str, held: str) -> DataError:
        wanted = f"{self.messages_field!r}, nor {_SHARED!r}, nor both {_PAIR[0]!r} and {_PAIR[1]!r}"
        return DataError(f"{place}: has no field {wanted}, but {held}; data.messages_field names the one to read")


def _system(value: Any, place: str) -> list[dict[str, Any]]:
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise DataError(f"{place}: the field 'system' is {shown(value)}, must be a string")
    return [{"role": "system", "content": value}]


def _checked(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages as templates want them: with `role` and `content`, and without what is null."""
    if not isinstance(value, list):
        raise DataError(f"{where} is {shown(value)}, must be a list of messages")
    if not value:
        raise DataError(f"{where} has no messages")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {shown(value)}, must be an object with role and content")
    message = {name: part for name, part in value.items() if part is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise DataError(f"{where} is from {shown(speaker)}, must be one of {', '.join(_ROLES)}")
        message = {"role": _ROLES[speaker], "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise DataError(f"{where} has no role, such as user or {ASSISTANT}")
    content = message.get("content")
    if content is None and message["role"] == ASSISTANT and any(name in message for name in _INSTEAD):
        return message
    if not isinstance(content, str):
        raise DataError(f"{where} has the content {shown(content)}, must be a string")
    return message


def _tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str):  # As tables have it, whose rows must be alike.
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{place}: the field 'tools' is not JSON ({error})") from error
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{place}: the field 'tools' is {shown(value)}, must be a list of objects")
    return value


def _without_nones(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nones(part) for name, part in value.items() if part is not None}
    return [_without_nones(part) for part in value] if isinstance(value, list) else value
