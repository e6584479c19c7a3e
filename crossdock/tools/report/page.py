"""The page: what is said about a run, in which order."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from crossdock.config import to_toml
from crossdock.parallel import LayoutError, ParallelDims
from crossdock.tools.report.balance import Balance, warnings
from crossdock.tools.report.charts import COLUMNS, Marks
from crossdock.tools.report.communication import communication_section
from crossdock.tools.report.curves import chart, charts, series_of
from crossdock.tools.report.document import document
from crossdock.tools.report.faults import faults_section, starts_figure
from crossdock.tools.report.maps import load_maps
from crossdock.tools.report.markup import cell, details, many, section, table
from crossdock.tools.report.numbers import count, short
from crossdock.tools.report.ranks import rank_figure, rank_section
from crossdock.tools.report.records import RunRecords
from crossdock.tools.report.times import times_section

__all__ = ["footer", "page", "run_name"]

# Of the training; loss has its validation beside it.
_CURVES = ("loss", "lr", "grad_norm", "tokens_per_second_per_gpu", "memory_gib", "max_mean_load", "tflops", "mfu")
# Beside the maps of loads.
_LOAD_CURVES = ("load_entropy", "load_variation", "dead_experts", "dropped_routes")
_TABLE_ROWS = 40


def page(records: RunRecords, live: tuple[str, float] | None = None) -> str:
    """The whole report as one HTML document; for `live` see `document`."""
    name = run_name(records)
    balance = Balance.of(*records.expert_loads) if records.expert_loads is not None else None
    content = (
        f"<header><h1>{escape(name)}</h1>{_facts(records)}</header>\n"
        f"{_key_figures(records)}\n{_alert(balance)}"
        f"{section('Training', _charts(records) + _figures_table(records))}"
        f"{section('Where the time goes', times_section(records))}"
        f"{section('Communication', communication_section(records))}"
        f"{section('Expert load', _load_charts(records) + _loads(balance))}"
        f"{section('Rank load', rank_section(records))}"
        f"{section('Faults and recoveries', faults_section(records))}"
        f"{_settings(records)}{footer(records.notes)}"
    )
    return document(name, content, records.span, live=live)


def run_name(records: RunRecords) -> str:
    """The name of the run folder; with that of the settings file where the folder is one of runs/NAME/DATE-TIME."""
    folder = records.folder.absolute()
    return f"{folder.parent.name} / {folder.name}" if folder.parent.parent.name == "runs" else folder.name


def _facts(records: RunRecords) -> str:
    facts = []
    config, ranks = records.config, records.world_size
    if config is not None:
        model = config.model
        facts.append(f"{model.name} {Path(model.hf_assets_path).name or model.flavor}")
        facts.append(config.training.dtype)
        facts.append(f"{config.training.seq_len:,} tokens per sequence")
    if ranks is not None:
        layout = f"{ranks} rank{'s' * (ranks > 1)}"
        if config is not None:
            try:
                dims = ParallelDims.from_config(config.parallelism, ranks)
                layout += f": {dims}, dp_shard {dims.dp_shard}"
            except LayoutError:
                pass  # The settings are for another number of ranks.
        facts.append(layout)
    facts.append(f"last step {records.ended:%Y-%m-%d %H:%M} UTC")
    return f'<p class="facts">{"".join(f"<span>{escape(fact)}</span>" for fact in facts)}</p>'


def _key_figures(records: RunRecords) -> str:
    figures: list[tuple[str, str, str]] = []
    for key, title in (("loss", "Loss"), ("validation_loss", "Validation loss")):
        newest = records.last(key)
        if newest is not None:
            values = records.column(key)
            first = np.flatnonzero(np.isfinite(values))[0]
            more = f"from {short(float(values[first]))} at step {int(records.steps[first]):,}"
            if key == "validation_loss":
                best = int(np.nanargmin(values))
                more = f"at step {newest[0]:,}; best {short(float(values[best]))} at step {int(records.steps[best]):,}"
            figures.append((title, short(newest[1]), more))
    figures.append(_progress(records))
    tokens = records.column("tokens")
    if np.isfinite(tokens).any():
        per_step = float(np.nanmedian(tokens))
        figures.append(("Tokens", count(float(np.nansum(tokens))), f"{count(per_step)} per step"))
    speed = records.column("tokens_per_second_per_gpu")
    if np.isfinite(speed).any():
        more = [
            f"{short(float(np.nanmedian(records.columns[key])))} {unit}" for key, unit in _SPEEDS if records.has(key)
        ]
        text = "; ".join(["tokens/s per rank, median", *more])
        figures.append(("Throughput", count(float(np.nanmedian(speed))), text))
    memory = records.column("memory_gib")
    if np.isfinite(memory).any():
        share = records.column("memory_percent")
        more = f"{short(float(np.nanmax(share)))} % of the device" if np.isfinite(share).any() else "the rank with most"
        figures.append(("Memory, peak", f"{np.nanmax(memory):.2f} <small>GiB</small>", more))
    load = records.last("max_mean_load")
    if load is not None:
        values = records.column("max_mean_load")
        worst = int(np.nanargmax(values))
        more = f"worst {values[worst]:.2f} at step {int(records.steps[worst]):,}"
        figures.append(("Busiest expert", f"{load[1]:.2f} <small>&times; mean</small>", more))
    figures += rank_figure(records)
    figures += starts_figure(records)
    figures.append(("Skipped steps", f"{_skipped(records):,}", "loss or gradient not finite, or a spike"))
    cells = "".join(
        f'<div><dt>{title}</dt><dd class="value">{value}</dd><dd class="more">{more}</dd></div>'
        for title, value, more in figures
    )
    return f'<dl class="figures">{cells}</dl>'


_SPEEDS = (("tflops", "TFLOP/s"), ("mfu", "% MFU"))


def _progress(records: RunRecords) -> tuple[str, str, str]:
    last = int(records.steps[-1])
    planned = records.config.training.steps if records.config is not None else None
    if planned is None:
        return "Steps", f"{last:,}", ""
    return "Steps", f"{last:,}", "complete" if last >= planned else f"of {planned:,}; not complete"


def _skipped(records: RunRecords) -> int:
    """The run's own count, which includes steps whose lines are lost; or what the lines show."""
    counted = records.last("skipped_steps")
    return max(int(counted[1]) if counted is not None else 0, int(records.skipped.sum()))


def _alert(balance: Balance | None) -> str:
    sentences = warnings(balance.final) if balance is not None else []
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="alert" role="note"><p><b>A router seems to collapse.</b></p><ul>{items}</ul></div>\n'


def _charts(records: RunRecords) -> str:
    losses = (name for name in records.columns if name.endswith("_loss") and name != "validation_loss")
    marked = records.steps[records.skipped]
    drawn = []
    for key in (*_CURVES, *losses):
        names = {key: ""} if key != "loss" else {"loss": "training", "validation_loss": "validation"}
        series = [series_of(records, own, name) for own, name in names.items() if records.has(own)]
        if series:
            skipped = Marks(marked) if key in ("loss", "grad_norm") else None
            drawn.append(chart(key, series, records.span, skipped))
    notes = []
    if records.span[1] - records.span[0] >= COLUMNS:
        notes.append("Lines are means of neighbouring steps, the bands around them their least and greatest values.")
    if len(marked):
        notes.append("A triangle marks steps that were skipped: their loss or gradient norm was not finite.")
    note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    return f'<div class="charts">{"".join(drawn)}</div>{note}'


def _load_charts(records: RunRecords) -> str:
    # A run without capacity drops nothing, and there is nothing to see.
    drops = records.has("dropped_routes") and np.nanmax(records.column("dropped_routes")) > 0
    drawn = charts(records, [key for key in _LOAD_CURVES if drops or key != "dropped_routes"])
    return f'<div class="charts even">{"".join(drawn)}</div>' if drawn else ""


def _figures_table(records: RunRecords) -> str:
    names = [name for name, values in records.columns.items() if np.isfinite(values).any()]
    rows = np.unique(np.linspace(0, len(records.steps) - 1, min(_TABLE_ROWS, len(records.steps))).round().astype(int))
    validated = np.flatnonzero(np.isfinite(records.column("validation_loss")))
    if len(validated):
        few = validated[np.linspace(0, len(validated) - 1, min(_TABLE_ROWS, len(validated))).round().astype(int)]
        rows = np.union1d(rows, few)
    body = [
        [f"{int(records.steps[row]):,}", *(cell(float(records.columns[name][row])) for name in names)] for row in rows
    ]
    caption = f"{len(body)} of {len(records.steps):,} steps; metrics.jsonl has them all."
    return details("Figures", table(caption, ["step", *names], body))


def _loads(balance: Balance | None) -> str:
    if balance is None:
        why = "The run holds no record of expert loads: metrics.load_interval is 0, or the run is shorter than it."
        return f'<p class="quiet">{why}</p>'
    layers, experts = balance.ratios.shape[1:]
    what = (
        "Tokens that each logical expert received, over the mean of its layer. "
        f"The model has {many(layers, 'MoE layer')} of {experts} experts; both are counted from 0."
    )
    return load_maps(balance, "expert", what)


def _settings(records: RunRecords) -> str:
    if records.config is None:
        return ""
    # Without the place of the run: a report is handed on.
    config = dataclasses.replace(records.config, job=dataclasses.replace(records.config.job, dump_folder=""))
    return details("Settings", f"<pre>{escape(to_toml(config))}</pre>")


def footer(notes: Sequence[str]) -> str:
    """What could not be read, a sentence each, and what wrote the page."""
    own, *others = (f"{name} {importlib.metadata.version(name)}" for name in ("crossdock", "torch", "transformers"))
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<footer>{said}Written by {escape(own)} with {escape(', '.join(others))}.</footer>"
