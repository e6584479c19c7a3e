"""The frame of a page: one file, its own style and scripts, nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from importlib.resources import files

__all__ = ["document"]


def document(title: str, content: str, span: tuple[int, int], *, live: tuple[str, float] | None = None) -> str:
    """A whole page.

    Args:
        title: text.
        content: markup; the titles of its sections make the table of contents.
        span: first and last step, which pointing at a curve goes by.
        live: of a page that a server keeps up to date: the tag of this state, and the seconds between looks for others.
    """
    folder = files("crossdock.tools.report")
    style = folder.joinpath("page.css").read_text()
    scripts = [folder.joinpath(name).read_text() for name in ("page.js", *(["live.js"] if live else []))]
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {' '.join(map(_hash, scripts))}"
    asks = "; connect-src 'self'" if live else ""
    status = (
        f'<p id="live" role="status" data-tag="{escape(live[0])}" data-seconds="{live[1]}">live</p>' if live else ""
    )
    first, last = span
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}{asks}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)} · crossdock</title><style>\n{style}</style></head>\n'
        f'<body><main data-first="{first}" data-last="{last}">{_contents(content)}</main>{status}'
        f"{''.join(f'<script>{script}</script>' for script in scripts)}</body></html>\n"
    )


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _contents(content: str) -> str:
    """`content` with links to its sections behind its header."""
    sections = re.findall(r'<section id="([^"]*)"><h2>([^<]*)</h2>', content)
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title in sections)
    head, end, rest = content.partition("</header>")
    return f'{head}<nav aria-label="Sections">{links}</nav>{end}{rest}' if len(sections) > 1 else content
