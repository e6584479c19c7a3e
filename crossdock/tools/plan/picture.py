"""A plan as a picture: where memory and time go."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from crossdock.tools.plan.planning import Plan
from crossdock.tools.plan.show import as_json

__all__ = ["picture"]

# Colours that differ for eyes that tell few colours apart (Okabe and Ito), and in grey.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
# On a phone, 400 pixels wide, text is still read.
_WIDTH, _BAR, _LEFT = 480, 34, 20
_STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1a1a1a}.title{font-weight:600;font-size:16px}.edge{stroke:#1a1a1a}"
    "svg{background:#fff;max-width:760px}@media(prefers-color-scheme:dark){text{fill:#eee}.edge{stroke:#eee}svg{background:#181818}}"
)


def picture(plan: Plan) -> str:
    """An SVG of its own: two bars with their parts named, in light and dark."""
    data = as_json(plan)["plan"]
    limit = plan.estimate.limit / 2**30
    memory = {name: value / 2**30 for name, value in data["memory_bytes"].items() if name != "peak"}
    seconds = {name: 1e3 * value for name, value in data["seconds"].items() if name != "step"}
    title = f"{plan.options.ranks} x {plan.options.device.name}"
    rate = f"{data['tokens_per_second_per_gpu']:,.0f} tokens per second and GPU, MFU {data['mfu']:.1f} %"
    body = [_text(_LEFT, 30, title, "title"), _text(_LEFT, 52, data["layout"]), _text(_LEFT, 74, rate)]
    parts, y = _bar(memory, 112, "GiB at the peak", "memory", limit)
    body += parts
    parts, y = _bar(seconds, y + 40, "ms of a step", "time", None)
    body += parts
    height, name = y + 20, f"{title}: {data['layout']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(name)}"><title>{escape(name)}</title><style>{_STYLE}</style>{"".join(body)}</svg>\n'
    )


def _bar(values: Mapping[str, float], y: int, unit: str, name: str, limit: float | None) -> tuple[list[str], int]:
    """One bar, its legend beneath; and where that ends."""
    total = sum(values.values())
    scale = (_WIDTH - 2 * _LEFT) / (max(total, limit or 0.0) or 1.0)
    parts = [_text(_LEFT, y - 8, f"{name}: {total:,.1f} {unit}" + (f" of {limit:,.1f}" if limit else ""))]
    x = float(_LEFT)
    for (part, value), colour in zip(values.items(), _COLOURS[: len(values)], strict=True):
        width = value * scale
        label = escape(f"{part}: {value:,.2f}")
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}">'
            f"<title>{label}</title></rect>"
        )
        x += width
    if limit:
        at = _LEFT + limit * scale
        parts.append(
            f'<line class="edge" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 4}" y2="{y + _BAR + 4}" stroke-width="2"/>'
        )
    y += _BAR + 24
    for (part, value), colour in zip(values.items(), _COLOURS[: len(values)], strict=True):
        parts.append(f'<rect x="{_LEFT}" y="{y - 11}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(_LEFT + 20, y, f"{part}: {value:,.2f}"))
        y += 22
    return parts, y


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</text>'
