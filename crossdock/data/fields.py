"""What of a line, a table's row or a file is a document: a text, by the name of its field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from crossdock.data.config import DataError

__all__ = ["Fields", "TextField", "held_names", "shown"]

DocumentT = TypeVar("DocumentT", covariant=True)


class Fields(Protocol[DocumentT]):
    """Reads documents out of what files hold. `place` is file and line, or row, for the message of a DataError."""

    @property
    def identity(self) -> Any:
        """JSON that differs where other documents would be read."""
        ...

    def columns(self, held: Sequence[str], place: str) -> list[str]:
        """Those of a table's columns that are read; raises DataError where one is missing."""
        ...

    def of_text(self, text: str, place: str) -> DocumentT:
        """The document that a whole file is."""
        ...

    def of_object(self, values: Mapping[str, Any], place: str) -> DocumentT:
        """The document of a JSON object."""
        ...

    def of_row(self, values: Mapping[str, Any], place: str) -> DocumentT:
        """The document of a table's row, of which `values` has the chosen columns."""
        ...


@dataclass(frozen=True)
class TextField:
    """A document is the text in the field, or column, `name`."""

    name: str

    @property
    def identity(self) -> str:
        return self.name

    def columns(self, held: Sequence[str], place: str) -> list[str]:
        if self.name not in held:
            names = ", ".join(held)
            raise DataError(f"{place}: has no column {self.name!r} but {names}; data.text_field names the one to read")
        return [self.name]

    def of_text(self, text: str, place: str) -> str:
        return text

    def of_object(self, values: Mapping[str, Any], place: str) -> str:
        if self.name not in values:
            held = held_names(values)
            raise DataError(f"{place}: has no field {self.name!r} but {held}; data.text_field names the one to read")
        text = values[self.name]
        if not isinstance(text, str):
            raise DataError(f"{place}: the field {self.name!r} is {shown(text)}, must be a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # By an escape.
            raise DataError(f"{place}: the field {self.name!r} has half a surrogate pair") from error
        return text

    def of_row(self, values: Mapping[str, Any], place: str) -> str:
        text = values[self.name]
        if not isinstance(text, str):
            raise DataError(f"{place}: {self.name!r} is {shown(text)}, must be a string")
        return text


def held_names(values: Mapping[str, Any]) -> str:
    """The fields of a JSON object in a message."""
    return ", ".join(map(repr, values)) or "none at all"


def shown(value: object) -> str:
    """A JSON value in a message."""
    written = json.dumps(value, default=str)
    return written if len(written) <= 40 else f"{written[:40]}..."
