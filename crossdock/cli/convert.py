"""`crossdock convert`: weights from one format to another, in this process."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from pathlib import Path

from crossdock.cli.common import Parser, fail, parse_bytes

__all__ = ["convert_command"]


def convert_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock convert SRC DST`."""
    parser = Parser(
        prog="crossdock convert",
        description="Write a model in another format, in one process, without a GPU or memory for all of it.",
        examples=(
            "crossdock convert Qwen3-30B-A3B runs/start",
            "crossdock convert runs/debug/20261121-101622 exported --dtype bfloat16",
            "crossdock convert Qwen3-1.7B runs/moe --upcycle 8,2",
        ),
        allow_abbrev=False,
    )
    kinds = "folder in Hugging Face's format, run folder, checkpoint, or folder of torch's distributed checkpoint"
    parser.add_argument("source", metavar="SRC", type=Path, help=kinds)
    parser.add_argument("destination", metavar="DST", type=Path, help="a folder that does not exist yet")
    to = "hf: Hugging Face's format; dcp: a run folder with weights alone (the other one than SRC)"
    parser.add_argument("--to", default="", choices=("hf", "dcp"), help=to)
    assets = "folder with config.json and tokenizer, for a folder of torch's distributed checkpoint"
    parser.add_argument("--assets", metavar="FOLDER", type=Path, help=assets)
    family = "as model.name, of a folder that is no run; else that of its model_type"
    parser.add_argument("--family", default="", help=family)
    upcycle = "make a MoE of a dense model: E copies of its blocks, K for each token"
    parser.add_argument("--upcycle", metavar="E,K", help=upcycle)
    parser.add_argument("--seed", type=int, help="of the routers that --upcycle draws (0)")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="", choices=dtypes, help="of the weights, with --to hf; else their own")
    size = "of a file, with --to hf, such as 500MB or 2GiB (5GB)"
    parser.add_argument("--max-shard-size", type=parse_bytes, help=size)
    parsed = parser.parse_args(arguments)
    upcycle = None if parsed.upcycle is None else _experts(parsed.upcycle)
    if parsed.seed is not None and not 0 <= parsed.seed < 2**63:
        parser.error("argument --seed must be 0 to 2^63 - 1")

    from crossdock.checkpoint import CheckpointError
    from crossdock.tools.convert import ConvertOptions, convert, plan_conversion
    from crossdock.train.metrics import say

    # What is half written is removed then, as by Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = None if parsed.assets is None else parsed.assets.absolute()
    chosen = ConvertOptions(parsed.to, folder, parsed.family, upcycle, parsed.seed, parsed.dtype, parsed.max_shard_size)
    try:
        convert(plan_conversion(parsed.source.absolute(), parsed.destination.absolute(), chosen), say)
    except CheckpointError as error:
        fail(str(error), exit_code=1)
    return 0


def _experts(text: str) -> tuple[int, int]:
    """`E,K`."""
    from crossdock.config import ConfigError

    match = re.fullmatch(r"(\d{1,6}),(\d{1,6})", text)
    if match is None or not 1 <= int(match[2]) <= int(match[1]):
        raise ConfigError("--upcycle", text, "E,K: experts of a layer and experts of a token, 1 <= K <= E, such as 8,2")
    return int(match[1]), int(match[2])
