"""The code blocks of the project's pages, and what of them is not run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

__all__ = ["REASONS", "ROOT", "Block", "blocks_of", "commands_of", "pages", "words_of"]

ROOT = Path(__file__).parents[1]
REASONS = (
    "needs a GPU",
    "needs a cluster",
    "needs an install",
    "needs the network",
    "the suite itself",
    "part of a program",
)
"""What a comment `<!-- not run: REASON -->`, the line before a block, begins with."""

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^(?P<fence>```+)(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    """Within the checkout."""
    line: int
    """Of its fence, from 1."""
    language: str
    text: str
    reason: str
    """Why it is not run; empty where it is."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README.md and all pages of docs/, within the checkout."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def blocks_of(page: str, language: str = "", *, text: str | None = None) -> list[Block]:
    """The blocks of a page, of one language if asked, or of a part of it, `text`."""
    whole = (ROOT / page).read_text() if text is None else text
    found = [
        Block(
            page,
            whole.count("\n", 0, match.start("fence")) + 1,
            match["language"].strip(),
            match["text"],
            match["reason"] or "",
        )
        for match in _BLOCK.finditer(whole)
    ]
    return [block for block in found if language in ("", block.language)]


def words_of(text: str) -> list[list[str]]:
    """The words of each command of a `bash` block, continued lines as one, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands_of(page: str, start: str = "", *, text: str | None = None) -> list[str]:
    """The commands of a page's `bash` blocks, of those alone that begin so.

    Args:
        page: within the checkout.
        start: a regular expression.
        text: a part of the page, in its place.
    """
    commands = [shlex.join(words) for block in blocks_of(page, "bash", text=text) for words in words_of(block.text)]
    return [command for command in commands if re.match(start, command)]
