"""A plan as tables for people, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crossdock.tools.plan.figures import Estimate, Memory
from crossdock.tools.plan.planning import Plan
from crossdock.tools.plan.search import ScaleRow, why
from crossdock.tools.plan.sizes import copies_bytes

__all__ = ["as_json", "show"]

_GIB = 2**30
_MEMORY = {
    "parameters": "float32 masters",
    "gradients": "",
    "optimizer": "moments",
    "activations": "",
    "buffers": "gathered parameters, reductions, exchanges",
}


def show(plan: Plan, console: Console) -> None:
    """Print all of a plan."""
    estimate, facts, options = plan.estimate, plan.facts, plan.options
    console.print(
        f"{facts.num_parameters / 1e9:,.2f} B parameters, {facts.active_parameters / 1e9:,.2f} B of them for a token; "
        f"{facts.num_layers} layers, {facts.num_experts} experts, top {facts.top_k}",
        highlight=False,
        markup=False,
    )
    training = estimate.config.training
    console.print(
        f"{options.ranks} x {options.device.name}: {estimate.dims}; local batch {training.local_batch_size} x "
        f"{training.seq_len} tokens, {estimate.micro_batches} micro-batch{'es' * (estimate.micro_batches > 1)} a step",
        highlight=False,
        markup=False,
    )
    for sentence in plan.chosen:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"dispatcher: {estimate.dispatcher}", highlight=False, markup=False)
    console.print(
        f"tokens over experts: {plan.skew}; busiest rank {estimate.routes.imbalance:.2f} x mean", markup=False
    )
    console.print(_memory_table(plan))
    console.print(_traffic_table(estimate))
    console.print(_time_table(plan))
    for warning in plan.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    if plan.found is not None:
        _show_found(plan, console)
    for title, rows in (
        ("strong: fixed local batch, more ranks", plan.strong),
        ("weak: fixed ranks, growing local batch", plan.weak),
    ):
        if rows:
            console.print(_scale_table(title, rows))


def _memory_table(plan: Plan) -> Table:
    estimate = plan.estimate
    memory, mode = estimate.memory, estimate.config.activation_checkpoint.mode
    of = "the busiest rank, by a dry run" if plan.run is not None else "the fullest rank, by formulas"
    table = Table(title=f"memory at the peak ({of})", title_justify="left")
    for name in ("kind", "GiB", ""):
        table.add_column(name, justify="right" if name == "GiB" else "left")
    copies = copies_bytes(estimate.config, plan.facts, estimate.dims)
    notes = _MEMORY | {"activations": f"recompute: {mode}"}
    if copies:
        notes["buffers"] += f"; {copies / _GIB:,.2f} for copies of experts (balance), by a formula"
    for name, note in notes.items():
        table.add_row(_word(name), f"{getattr(memory, name) / _GIB:,.2f}", note)
    table.add_section()
    verdict = "fits" if estimate.fits else "does not fit"
    limit = f"{verdict}: {estimate.memory_percent:.0f} % of {estimate.device.memory_gib:.1f} GiB"
    table.add_row("peak", f"{memory.total / _GIB:,.2f}", f"{limit}, of which {estimate.limit / _GIB:.1f} may be used")
    return table


def _traffic_table(estimate: Estimate) -> Table:
    of = "the busiest rank sends in a step, by a dry run" if estimate.measured else "a rank sends, mean, by formulas"
    table = Table(title=f"bytes that {of}", title_justify="left")
    table.add_column("kind")
    for name in ("NVLink GiB", "network GiB", "ms by itself"):
        table.add_column(name, justify="right")
    for flow in estimate.flows.values():
        table.add_row(
            flow.name, f"{flow.nvlink / _GIB:,.2f}", f"{flow.network / _GIB:,.2f}", f"{1e3 * flow.seconds:,.1f}"
        )
    return table


def _time_table(plan: Plan) -> Table:
    estimate, work = plan.estimate, plan.estimate.work
    table = Table(title="a step", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in _work(estimate).items():
        table.add_row(name, f"{1e3 * value:,.1f} ms")
    table.add_section()
    table.add_row("step", f"{1e3 * work.step:,.1f} ms")
    table.add_row("tokens per second and GPU", f"{estimate.tokens_per_second:,.0f}")
    table.add_row("model TFLOP/s per GPU", f"{estimate.tflops:,.1f}")
    table.add_row("MFU", f"{estimate.mfu:.1f} %")
    table.add_row("cost of a million tokens", f"$ {estimate.dollars_per_million_tokens:,.4f}")
    for name, value in _totals(plan).items():
        table.add_row(name, value)
    return table


def _work(estimate: Estimate) -> dict[str, float]:
    work = estimate.work
    return {
        "products": work.compute,
        "experts' exchanges, not hidden": work.exchange,
        "gathers and reductions, not hidden": work.collectives,
        "exchanges over tp and cp": work.layout,
        "waiting in the pipeline": work.bubble,
        "optimizer": work.optimizer,
    }


def _totals(plan: Plan) -> dict[str, str]:
    """Of a whole training."""
    tokens, estimate = plan.options.tokens, plan.estimate
    if not tokens:
        return {}
    rate = estimate.tokens_per_second * plan.options.ranks
    hours = tokens / rate / 3600
    return {
        "tokens per second, all GPUs": f"{rate:,.0f}",
        f"days for {tokens:.3g} tokens": f"{hours / 24:,.1f}",
        "GPU hours": f"{hours * plan.options.ranks:,.0f}",
        "cost": f"$ {hours * plan.options.ranks * estimate.device.dollars_per_hour:,.0f}",
    }


def _show_found(plan: Plan, console: Console) -> None:
    found = plan.found
    assert found is not None
    console.print(f"{found.tried:,} combinations of layout, batch, chunks and accumulation; {found.fitting:,} fit")
    if not found.ranked:
        least = found.least
        if least is not None:
            console.print(
                f"none fits: the least is {least.memory.total / _GIB:.1f} GiB, with {least.dims}", markup=False
            )
        return
    table = Table(title="best layouts", title_justify="left")
    for name in ("layout", "batch x micro", "chunks", "reduced per", "tok/s/GPU", "GiB", "by", "why not better"):
        table.add_column(name, justify="right" if name in ("chunks", "tok/s/GPU", "GiB") else "left")
    best = found.ranked[0]
    for each in found.ranked:
        table.add_row(
            str(each.dims),
            f"{each.config.training.local_batch_size} x {each.micro_batches}",
            str(each.chunks),
            each.config.parallelism.gradient_reduction.replace("_", "-"),
            f"{each.tokens_per_second:,.0f}",
            f"{each.memory.total / _GIB:,.1f}",
            "dry run" if each.measured else "formula",
            "best" if each is best else why(best, each),
        )
    console.print(table)


def _scale_table(title: str, rows: list[ScaleRow]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("GPUs", "ep", "batch", "tok/s/GPU", "TFLOPS", "GiB", "%", "fails"):
        table.add_column(name, justify="left" if name == "fails" else "right")
    for row in rows:
        table.add_row(str(row.ranks), str(row.ep), str(row.local_batch), *_scale_cells(row), escape(row.problem))
    return table


def _scale_cells(row: ScaleRow) -> Iterator[str]:
    each = row.estimate
    if each is None:
        yield from ("",) * 4
        return
    runs = not row.problem
    yield f"{each.tokens_per_second:,.0f}" if runs else ""
    yield f"{each.tflops:,.1f}" if runs else ""
    yield f"{each.memory.total / _GIB:,.1f}"
    yield f"{each.memory_percent:.0f}"


def _word(name: str) -> str:
    return {"optimizer": "optimizer state", "buffers": "communication buffers"}.get(name, name)


def as_json(plan: Plan) -> dict[str, Any]:
    """All of a plan, bytes and seconds as numbers."""
    result = {
        "ranks": plan.options.ranks,
        "device": plan.options.device.name,
        "skew": plan.skew,
        "calibration": plan.calibration,
        "chosen": plan.chosen,
        "model": {
            "parameters": plan.facts.num_parameters,
            "active_parameters": plan.facts.active_parameters,
            "flops_per_token": plan.estimate.flops,
        },
        "plan": _estimate_json(plan.estimate),
        "warnings": plan.warnings,
    }
    if plan.run is not None:
        counted = plan.run.counted
        result["dry_run"] = {
            "micro_batches": min(plan.estimate.micro_batches, 2),
            "peaks": dict(counted.peaks),
            "sent": {f"{op} {dim}": each.total for (op, dim), each in counted.sent.items()},
            "dispatchers": {n: getattr(plan.run, n) for n in ("within", "between", "metadata")},
        }
    if plan.options.tokens:
        rate = plan.estimate.tokens_per_second * plan.options.ranks
        result["training"] = {
            "tokens": plan.options.tokens,
            "tokens_per_second": rate,
            "days": plan.options.tokens / rate / 86400,
            "gpu_hours": plan.options.tokens / rate / 3600 * plan.options.ranks,
        }
    if plan.found is not None:
        result["search"] = {
            "tried": plan.found.tried,
            "fitting": plan.found.fitting,
            "ranked": [_estimate_json(each) for each in plan.found.ranked],
        }
    for name, rows in (("strong", plan.strong), ("weak", plan.weak)):
        if rows:
            result[name] = [_row_json(row) for row in rows]
    return result


def _row_json(row: ScaleRow) -> dict[str, Any]:
    base = {"ranks": row.ranks, "ep": row.ep, "local_batch_size": row.local_batch, "fails": row.problem}
    return base if row.estimate is None else base | _estimate_json(row.estimate)


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    config, memory = estimate.config, estimate.memory
    return {
        "layout": str(estimate.dims),
        "local_batch_size": config.training.local_batch_size,
        "micro_batches": estimate.micro_batches,
        "overlap_chunks": estimate.chunks,
        "gradient_reduction": config.parallelism.gradient_reduction,
        "dispatcher": estimate.dispatcher,
        "fits": estimate.fits,
        "memory_bytes": {name: getattr(memory, name) for name in Memory.__dataclass_fields__} | {"peak": memory.total},
        "memory_percent": estimate.memory_percent,
        "memory_from": "dry run" if estimate.measured else "formulas",
        "sent_from": "dry run" if estimate.measured else "formulas",
        "sent_bytes": {flow.name: {"nvlink": flow.nvlink, "network": flow.network} for flow in estimate.flows.values()},
        "seconds": _work(estimate) | {"step": estimate.work.step},
        "tokens_per_second_per_gpu": estimate.tokens_per_second,
        "tflops": estimate.tflops,
        "mfu": estimate.mfu,
        "dollars_per_million_tokens": estimate.dollars_per_million_tokens,
        "imbalance": estimate.routes.imbalance,
    }
