"""`crossdock plan`: what a run would take, before any GPU is paid for."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

from crossdock.cli.common import Parser, check_output, fail, machine_options, shell_console, split_path

__all__ = ["plan_command"]

_EXAMPLES = """\
examples
  crossdock plan configs/qwen3_30b_a3b.toml --gpus 128 --gpu b200
  crossdock plan configs/qwen3_30b_a3b.toml --gpus 64 --gpu h100 --search
  crossdock plan configs/qwen3_30b_a3b.toml --gpus 8 --gpu b200 --scale 8,16,32 --ep 1,2,4,8 --tokens 36T
"""
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def plan_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock plan [CONFIG.toml] --gpus N --gpu NAME [--section.key value ...]`."""
    parser = Parser(
        prog="crossdock plan",
        usage="crossdock plan [CONFIG.toml] --gpus N --gpu NAME [--search] [--scale N,N,...] [--section.key value ...]",
        description="What a run would take, by a dry run of the real model and layout with no memory behind it: does "
        "it fit, how fast will it be, which layout is best. Settings are those of `crossdock train`.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run, over all machines")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="b200, h200, h100, a100, cpu, or your own")
    parser.add_argument("--devices", type=Path, metavar="FILE", help="TOML with devices of your own (docs/plan.md)")
    parser.add_argument(
        "--skew",
        default="uniform",
        metavar="LAW",
        help="tokens over experts: uniform (default), zipf:EXPONENT, or the folder of a run that recorded it",
    )
    parser.add_argument("--achieved", type=float, metavar="SHARE", help="of the device's peak, in place of the table's")
    parser.add_argument("--search", action="store_true", help="rank all layouts, local batches, chunks, accumulations")
    parser.add_argument("--scale", type=_numbers, default=(), metavar="N,N", help="two tables: these numbers of GPUs")
    parser.add_argument("--ep", type=_numbers, default=(), metavar="N,N", help="with --scale: expert-parallel degrees")
    parser.add_argument(
        "--tokens", type=_tokens, default=0.0, metavar="N", help="of a training, such as 36T: days, cost"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw memory and time there")
    parsed, rest = parser.parse_known_args(arguments)
    if options != machine_options([])[0]:
        parser.error("argument --nproc or its like: a plan starts no ranks; --gpus is their number")
    check_output(parser, "--json", parsed.json)
    check_output(parser, "--picture", parsed.picture)
    if parsed.gpus < 1:
        parser.error(f"argument --gpus = {parsed.gpus}: must be 1 or more")
    if parsed.achieved is not None and not 0 < parsed.achieved <= 1:
        parser.error(f"argument --achieved = {parsed.achieved}: must be a share, above 0 and at most 1")
    if parsed.ep and not parsed.scale:
        parser.error("argument --ep: needs --scale")

    from crossdock.config import load_config
    from crossdock.tools.plan import (
        DeviceError,
        PlanOptions,
        SkewError,
        as_json,
        find_device,
        make_plan,
        picture,
        read_devices,
        show,
    )
    from crossdock.train.dry_run import dry_run

    config = load_config(*split_path(rest))
    try:
        device = find_device(parsed.gpu, read_devices(parsed.devices))
        asked = PlanOptions(
            parsed.gpus,
            device,
            parsed.skew,
            parsed.search,
            parsed.scale,
            parsed.ep,
            parsed.tokens,
            parsed.achieved,
        )
        plan = make_plan(config, asked, dry_run)
    except (DeviceError, SkewError) as error:
        fail(str(error))
    show(plan, shell_console(160))
    for path, text in (
        (parsed.json, lambda: json.dumps(as_json(plan), indent=1) + "\n"),
        (parsed.picture, lambda: picture(plan)),
    ):
        if path is not None:
            try:
                path.write_text(text())
            except OSError as error:
                fail(f"{path} cannot be written: {error.strerror}")
            print(f"written: {path}")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them, such as 8,16,32")
    return tuple(map(int, text.split(",")))


def _tokens(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.strip(), re.IGNORECASE)
    number = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of tokens, such as 500B or 36T")
    return number
