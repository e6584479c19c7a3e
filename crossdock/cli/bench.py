"""`crossdock bench`: ways of moving tokens, beside a plain all-to-all."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from crossdock.cli.common import Parser, check_gpus, check_output, fail, is_rank, machines_of

if TYPE_CHECKING:
    import torch

    from crossdock.tools.bench import Bench, Workload

__all__ = ["bench_command"]

_DTYPES = ("float32", "bfloat16")
_TOKENS, _TOKENS_ON_CPU = 1024, 256
# Of a speed that is assumed.
_LEAST, _MOST = 1e-6, 1e9
# What a simulated cluster can have: counting takes memory for every pair of ranks.
_MOST_RANKS, _MOST_EXPERTS, _MOST_ROUTES = 1024, 4096, 2**26


def bench_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock bench [--simulate --ranks N]`."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    _check(parser, parsed, options)

    from crossdock.tools.bench import BenchError, Speeds, simulate
    from crossdock.tools.report import ReportError

    try:
        if parsed.simulate:
            speeds = Speeds(parsed.within * 1e9, parsed.between * 1e9, parsed.tflops * 1e12, parsed.latency * 1e-6)
            _write(simulate(_workload(parsed, parsed.ranks), speeds), parsed.output)
            return 0
        if is_rank():
            return _rank(parsed)
        machines = machines_of(options)
        check_gpus(machines)
        if parsed.ranks_per_node and machines.world_size % parsed.ranks_per_node:
            parser.error(f"argument --ranks-per-node must divide the {machines.world_size} ranks (--nproc)")
        from crossdock.train.launch import start_ranks

        return start_ranks(["bench", *arguments], machines)
    except ReportError as error:
        fail(str(error))
    except BenchError as error:
        fail(str(error), exit_code=1)


def _parser() -> Parser:
    parser = Parser(
        prog="crossdock bench",
        description="Ways of moving the tokens of one MoE layer, beside a plain all-to-all: a token once per rank, "
        "once per node, in fp8, in chunks, to experts that are placed by their loads. On real ranks of this machine "
        "(--nproc), forward and backward; or with --simulate, for a cluster whose bytes are counted and whose times "
        "are computed from assumed speeds. Writes a page, prints a table.",
        examples=(
            "crossdock bench --nproc 2 --experts 32 --rounds 9",
            "crossdock bench --simulate --ranks 64 --hidden-size 2048 --intermediate-size 768 --tokens 4096",
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--simulate", action="store_true", help="count for a cluster that is not there")
    add("--ranks", type=int, help="of the simulated cluster, up to 1024 (64)")
    add("--ranks-per-node", type=int, default=0, help="consecutive ranks that share a node (8; measured: all)")
    add("--experts", type=int, default=128, help="of the layer, up to 4096 (128)")
    add("--top-k", type=int, default=8, help="experts per token (8)")
    add("--hidden-size", type=int, default=1024, help="values of a token (1024)")
    add("--intermediate-size", type=int, default=384, help="inner size of an expert (384)")
    add("--tokens", type=int, help="of each rank (1024; measured on a CPU 256)")
    add("--dtype", choices=_DTYPES, help="of activations (float32; simulated, or on a GPU, bfloat16)")
    add("--skew", default="zipf:0.5", help="how popular experts are: uniform, or zipf:S (zipf:0.5)")
    add("--seed", type=int, default=0, help="of the routes (0)")
    add("--rounds", type=int, default=7, help="in which each case has its turn (7)")
    add("--within", type=float, default=450.0, metavar="GB/S", help="simulated: a rank's link to its node (450)")
    add("--between", type=float, default=50.0, metavar="GB/S", help="simulated: a rank's link to other nodes (50)")
    add("--tflops", type=float, default=400.0, help="simulated: that experts reach (400)")
    add("--latency", type=float, default=20.0, metavar="US", help="simulated: microseconds per exchange (20)")
    add("--output", metavar="FILE", type=Path, default=Path("bench.html"), help="the page (bench.html)")
    return parser


def _check(parser: Parser, parsed: argparse.Namespace, options: argparse.Namespace) -> None:
    from crossdock.tools.bench import parse_skew

    check_output(parser, "--output", parsed.output)
    if parsed.ranks is not None and not parsed.simulate:
        parser.error("argument --ranks goes with --simulate; --nproc is the number of ranks that are measured")
    if parsed.simulate and options.nproc is not None:
        parser.error("argument --nproc does not go with --simulate; --ranks is the number of simulated ranks")
    if parsed.simulate and parsed.tokens is None:
        parsed.tokens = _TOKENS
    parsed.ranks = 64 if parsed.ranks is None else parsed.ranks
    if parsed.simulate and not parsed.ranks_per_node:
        parsed.ranks_per_node = min(8, parsed.ranks)
    ranges = {
        "ranks": (2, _MOST_RANKS),
        "ranks_per_node": (0, _MOST_RANKS),
        "experts": (1, _MOST_EXPERTS),
        "top_k": (1, parsed.experts),
        "hidden_size": (8, 2**17),
        "intermediate_size": (8, 2**17),
        "tokens": (1, 2**20),
        "rounds": (1, 1000),
        "seed": (0, 2**31 - 1),
    }
    for name, (least, most) in ranges.items():
        if getattr(parsed, name) is not None and not least <= getattr(parsed, name) <= most:
            parser.error(f"argument --{name.replace('_', '-')} must be {least} to {most}, not {getattr(parsed, name)}")
    if parsed.simulate and parsed.ranks % parsed.ranks_per_node:
        parser.error(f"argument --ranks-per-node must divide --ranks, {parsed.ranks}")
    if parsed.simulate and parsed.ranks * parsed.tokens * parsed.top_k > _MOST_ROUTES:
        parser.error(f"argument --tokens: {_MOST_ROUTES:,} routes are the most that are drawn; fewer tokens, please")
    for name in ("within", "between", "tflops", "latency"):
        value = getattr(parsed, name)
        if not (_LEAST <= value <= _MOST or (name == "latency" and value == 0)):
            parser.error(f"argument --{name} must be a positive number, {_LEAST:g} to {_MOST:g}")
    try:
        parsed.skew = parse_skew(parsed.skew)
    except ValueError as error:
        parser.error(f"argument --skew: {error}")


def _workload(parsed: argparse.Namespace, ranks: int, device: torch.device | None = None) -> Workload:
    import torch

    from crossdock.tools.bench import Workload

    narrow = device is None or device.type == "cuda"
    return Workload(
        ranks,
        min(parsed.ranks_per_node or ranks, ranks),
        parsed.experts,
        parsed.top_k,
        parsed.hidden_size,
        parsed.intermediate_size,
        parsed.tokens or (_TOKENS if narrow else _TOKENS_ON_CPU),
        getattr(torch, parsed.dtype or _DTYPES[narrow]),
        parsed.skew,
        parsed.seed,
    )


def _rank(parsed: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from crossdock.tools.bench import measure
    from crossdock.train.launch import run_rank

    def act(device: torch.device) -> int:
        ranks = dist.get_world_size()
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores, gloo"
        facts = [f"measured on {where}", f"torch {torch.__version__}", f"{parsed.rounds} rounds"]
        bench = measure(_workload(parsed, ranks, device), device, parsed.rounds, facts)
        if dist.get_rank() == 0:
            _write(bench, parsed.output)
        return 0

    return run_rank(act, os.environ)


def _write(bench: Bench, output: Path) -> None:
    from crossdock.tools.bench import bench_page, bench_table
    from crossdock.tools.report import write_page

    path = write_page(output, lambda: bench_page(bench))
    print(f"{bench_table(bench)}\n{path}", flush=True)
