"""What the commands share: how many ranks run where, and one message for a mistake."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

    from crossdock.train.launch import Machines

__all__ = [
    "MACHINE_OPTIONS",
    "Parser",
    "check_gpus",
    "check_output",
    "fail",
    "is_rank",
    "machine_options",
    "machines_of",
    "parse_bytes",
    "shell_console",
    "split_path",
]

MACHINE_OPTIONS = ("--nproc", "--nnodes", "--node-rank", "--master-addr", "--master-port")
"""How many ranks run where."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def machine_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """How many ranks run where; and the arguments that are about something else."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--nnodes", type=_machine_range, default=(None, 1))
    parser.add_argument("--node-rank", "--node_rank", type=int, default=0)
    parser.add_argument("--master-addr", "--master_addr")
    parser.add_argument("--master-port", "--master_port", type=int, default=29500)
    options, rest = parser.parse_known_args(arguments)
    for argument in (argument for argument in rest if argument.startswith("--")):
        nearest = difflib.get_close_matches(argument.partition("=")[0], MACHINE_OPTIONS, n=1, cutoff=0.75)
        if nearest:
            parser.error(f"argument {argument} does not exist; did you mean {nearest[0]}?")
    return options, rest


class Parser(argparse.ArgumentParser):
    """One message for a mistake, as everywhere; help that ends with examples.

    Args:
        *arguments: of `argparse.ArgumentParser`.
        examples: whole commands.
        **settings: of `argparse.ArgumentParser`.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._examples = examples

    def format_help(self) -> str:
        text = super().format_help()
        # Not as an epilog, whose lines argparse joins.
        return text + "".join(("\nexamples\n", *(f"  {each}\n" for each in self._examples))) if self._examples else text

    def error(self, message: str) -> NoReturn:
        fail(message)


def machines_of(options: argparse.Namespace) -> Machines:
    """What `machine_options` has read, checked; raises ConfigError."""
    from crossdock.train.launch import Machines, default_nproc

    nproc = default_nproc() if options.nproc is None else options.nproc
    fewest, most = options.nnodes
    return Machines(nproc, most, options.node_rank, options.master_addr, options.master_port, fewest)


def _machine_range(text: str) -> tuple[int | None, int]:
    """`4`, or `2:4` for at least 2 and at most 4."""
    fewest, colon, most = text.rpartition(":")
    try:
        return int(fewest) if colon else None, int(most)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of machines, or MIN:MAX") from None


def check_gpus(machines: Machines, dtype: str = "") -> None:
    """Raises ConfigError for more ranks than a machine has GPUs, where it has any, or a `dtype` that they lack."""
    import torch

    from crossdock.config import ConfigError

    gpus = torch.cuda.device_count()
    if gpus and machines.nproc > gpus:
        raise ConfigError("--nproc", machines.nproc, f"at most {gpus}, the GPUs of this machine")
    if gpus and dtype == "float64":
        raise ConfigError("training.dtype", "float64", "is for CPU alone; CUDA_VISIBLE_DEVICES= hides the GPUs")


def check_output(parser: Parser, name: str, path: Path | None) -> None:
    """One message, before any work, for a file that cannot be written."""
    if path is None:
        return
    if path.is_dir() or not path.name:
        parser.error(f"argument {name}: cannot write {path}: it is a folder; name a file")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        parser.error(f"argument {name}: cannot write {path}: {path.absolute().parent} is no folder to write to")


def shell_console(width: int) -> Console:
    """Of a terminal's width, or of this one where there is no terminal. Whoever stops reading is no mistake: it raises
    BrokenPipeError, as `print` does, for the exit code that shells expect."""
    from rich.console import Console

    class ShellConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    console = ShellConsole()
    return console if console.is_terminal else ShellConsole(width=width)


def parse_bytes(text: str) -> int:
    """`500MB`, `2GiB` or a number of bytes, for `argparse`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip(), re.IGNORECASE)
    size = round(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 500MB or 2GiB")
    return size


def split_path(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """A first argument that is no option is the config file."""
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), arguments[1:]
    return None, arguments


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def fail(message: str, *, exit_code: int = 2) -> NoReturn:
    """End with one message for a person; of a machine's ranks only the first speaks."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    if not is_rank() or os.environ["LOCAL_RANK"] == "0":
        panel = Panel(Text(message), title="crossdock", title_align="left", border_style="red")
        Console(stderr=True).print(panel)
    sys.exit(exit_code)
