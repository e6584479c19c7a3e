"""`crossdock doctor`: what this machine is, what works on it, and a test of its ranks."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from crossdock.cli.common import Parser, check_gpus, is_rank, machines_of

if TYPE_CHECKING:
    import torch

    from crossdock.tools.doctor import Finding

__all__ = ["doctor_command"]

_TEST_SECONDS = 60
_PACKAGES = ("transformers", "tokenizers", "safetensors", "accelerate", "torchft", "liger-kernel")


def doctor_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock doctor [--no-test] [--json]`."""
    parser = Parser(
        prog="crossdock doctor",
        usage="crossdock doctor [--nproc N] [--no-test] [--json]",
        description="Print what this machine is, which versions are installed, which process groups, dispatchers and "
        "experts backends work here, and what is missing for the others. Then run an MoE layer over the ranks of this "
        "machine with every dispatcher that works, compare its numbers with those of one process, and time an "
        "all-to-all; that takes some ten seconds.",
        epilog="Exit code: 0 where the test passed, 1 where it did not, 2 for a mistake in the command.",
        examples=("crossdock doctor", "crossdock doctor --nproc 4", "crossdock doctor --json > machine.json"),
        allow_abbrev=False,
    )
    parser.add_argument("--no-test", dest="test", action="store_false", help="look, but start no ranks")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON, and start no ranks")
    parsed = parser.parse_args(arguments)
    if is_rank():
        return _rank()

    import torch

    from crossdock import __version__
    from crossdock.tools.doctor import checkup, installed_versions, machine_facts
    from crossdock.train.launch import start_ranks

    machines = machines_of(options)
    check_gpus(machines)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = checkup(device, machines.nproc)
    facts, versions = machine_facts(), {"crossdock": __version__, **installed_versions(_PACKAGES)}
    if parsed.json:
        findings = [finding._asdict() for finding in found]
        print(json.dumps({"machine": facts, "versions": versions, "findings": findings}, indent=1), flush=True)
    else:
        _print(facts, versions, found)
    if parsed.json or not parsed.test:
        return 0
    return start_ranks(["doctor"], machines)


def _print(facts: dict[str, Any], versions: dict[str, str | None], found: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, values in (("machine", facts), ("versions", versions)):
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for name, value in values.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)
            table.add_row(name, Text(text))
        console.print(table)
    groups = dict.fromkeys(finding.group for finding in found)
    table = Table(title="what works here", title_justify="left", show_header=False, box=None)
    for group in groups:
        for finding in (each for each in found if each.group == group):
            mark = Text("no", style="yellow") if finding.problem else Text("yes", style="green")
            table.add_row(group, finding.name, mark, Text(finding.problem or finding.detail))
    console.print(table)
    sys.stdout.flush()


def _rank() -> int:
    from crossdock.train.launch import run_rank

    return run_rank(_test, os.environ, _TEST_SECONDS)


def _test(device: torch.device) -> int:
    import torch.distributed as dist

    from crossdock.tools.doctor import checkup, self_test

    ranks = dist.get_world_size()
    works = [each.name for each in checkup(device, ranks) if each.group == "dispatcher" and not each.problem]
    tested, rate = self_test(device, works)
    if dist.get_rank() == 0:
        print(f"test over {ranks} ranks of this machine ({device.type})")
        for each in tested:
            alike = f"to {each.error:.0e} of the largest" if each.error else "bit by bit"
            told = each.problem or f"as one process, {alike}"
            print(f"  dispatcher {each.name}: {told}")
        if rate:
            print(f"  all-to-all: {rate / 1e9:.2f} GB/s from each rank to the others")
        print("the test failed" if any(each.problem for each in tested) else "all well", flush=True)
    return int(any(each.problem for each in tested))
