"""What a report shows, read back from its page."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from html import unescape
from typing import Any

import numpy as np

__all__ = ["bars_of", "charts_of", "figures_of", "maps_of", "points", "rows_of"]


def points(html: str, chart: str) -> list[dict[str, Any]]:
    match = re.search(rf'data-chart="{chart}" data-points="([^"]*)"', html)
    assert match is not None, f"there is no chart of {chart}"
    return json.loads(unescape(match[1]))


def charts_of(html: str) -> list[str]:
    return re.findall(r'data-chart="(\w+)"', html)


def figures_of(html: str) -> dict[str, str]:
    """The key figures by their titles, value and note in one."""
    found = re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd><dd[^>]*>(.*?)</dd>", html)
    return {title: unescape(re.sub(r"<[^>]*>", "", f"{value} {more}")) for title, value, more in found}


def maps_of(html: str) -> dict[str, np.ndarray]:
    """The palette indices of each panel."""
    found = re.findall(r'data-panel="([\w-]+)".*?href="data:image/png;base64,([^"]*)"', html)
    return {name: _pixels(base64.b64decode(data)) for name, data in found}


def _pixels(png: bytes) -> np.ndarray:
    """Of a PNG as the standard has it: 8 bits and a palette, no filters, one chunk of data."""
    chunks, rest = {}, png.removeprefix(b"\x89PNG\r\n\x1a\n")
    while rest:
        size, name = struct.unpack(">I4s", rest[:8])
        data, check = rest[8 : 8 + size], rest[8 + size : 12 + size]
        assert zlib.crc32(name + data).to_bytes(4, "big") == check
        chunks[name], rest = data, rest[12 + size :]
    assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 3, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def bars_of(html: str, section: str) -> dict[str, list[str]]:
    """The rows of the bars below a section's title, by name: the widths of their pieces, then the texts."""
    content = html[html.index(f"<h2>{section}</h2>") :].partition("</section>")[0]
    found = {}
    for row in re.findall(r'<tr><th scope="row">(.*?)</tr>', content):
        name, *cells = re.findall(r"(?:^|<td[^>]*>)(.*?)</t[hd]>", row)
        widths = re.findall(r"width:([\d.]+)%", cells[0])
        found[unescape(name)] = [*widths, *map(unescape, cells[1:])]
    return found


def rows_of(html: str, title: str) -> list[list[str]]:
    """The rows of the table behind a title, each cell as its text."""
    table = html[html.index(f"<summary>{title}</summary>") :].partition("<tbody>")[2].partition("</tbody>")[0]
    return [
        [unescape(text) for text in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in table.split("</tr>")[:-1]
    ]
