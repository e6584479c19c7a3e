"""`crossdock convert`: weights from one format to another, in this process."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from crossdock.cli.common import Parser, fail

__all__ = ["convert_command"]

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def convert_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock convert SRC DST`."""
    parser = Parser(
        prog="crossdock convert",
        description="Write a model in another format, in one process, without a GPU or memory for all of it.",
        allow_abbrev=False,
    )
    kinds = "folder in Hugging Face's format, run folder, checkpoint, or folder of torch's distributed checkpoint"
    parser.add_argument("source", metavar="SRC", type=Path, help=kinds)
    parser.add_argument("destination", metavar="DST", type=Path, help="a folder that does not exist yet")
    to = "hf: Hugging Face's format; dcp: a run folder with weights alone (the other one than SRC)"
    parser.add_argument("--to", default="", choices=("hf", "dcp"), help=to)
    assets = "folder with config.json and tokenizer, for a folder of torch's distributed checkpoint"
    parser.add_argument("--assets", metavar="FOLDER", type=Path, help=assets)
    upcycle = "make a MoE of a dense model: E copies of its blocks, K for each token"
    parser.add_argument("--upcycle", metavar="E,K", help=upcycle)
    parser.add_argument("--seed", type=int, help="of the routers that --upcycle draws (0)")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="", choices=dtypes, help="of the weights, with --to hf; else their own")
    parser.add_argument("--file-size", metavar="SIZE", help="of the files, with --to hf, such as 500MB (5GB)")
    parsed = parser.parse_args(arguments)
    upcycle = None if parsed.upcycle is None else _experts(parsed.upcycle)
    file_bytes = None if parsed.file_size is None else _bytes(parsed.file_size)
    if parsed.seed is not None and not 0 <= parsed.seed < 2**63:
        parser.error("argument --seed must be 0 to 2^63 - 1")

    from crossdock.checkpoint import CheckpointError
    from crossdock.tools.convert import ConvertOptions, convert, plan_conversion
    from crossdock.train.metrics import say

    folder = None if parsed.assets is None else parsed.assets.absolute()
    chosen = ConvertOptions(parsed.to, folder, upcycle, parsed.seed, parsed.dtype, file_bytes)
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


def _bytes(text: str) -> int:
    """`5GB` and the like."""
    from crossdock.config import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise ConfigError("--file-size", text, "a number above 0 and one of KB, MB, GB, TB, KiB, MiB, GiB, TiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
