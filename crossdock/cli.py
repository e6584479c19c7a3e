"""The command line. Exit codes: 0 done or stopped as asked, 2 a mistake of the user's (one message), else a failure."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from crossdock import __version__

__all__ = ["main"]

_USAGE = """\
crossdock: expert parallelism for PyTorch

  crossdock train  [CONFIG.toml] [--section.key value ...]   train a Mixture-of-Experts model
  crossdock config [CONFIG.toml] [--section.key value ...]   print the resolved settings as TOML
  crossdock --version

train starts its own ranks, one per GPU or two on a machine without. Several machines run the same command:
  --nproc N          ranks on this machine
  --nnodes N         machines (1)
  --node-rank N      this machine, from 0 (0)
  --master-addr A    name or address of machine 0
  --master-port P    a free port there (29500)

crossdock train --help lists all settings.

examples
  crossdock train configs/debug.toml --training.steps 20
  crossdock train configs/debug.toml --nproc 4 --parallelism.expert-parallel-degree 4
"""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of `crossdock` and `python -m crossdock`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("", "-h", "--help", "help"):
        print(_USAGE, end="")
        sys.exit(0 if command else 2)
    if command == "--version":
        print(f"crossdock {__version__}")
        sys.exit(0)
    if command not in ("train", "config"):
        _fail("command", command, "one of train, config, --version, --help")
    sys.exit(_train(rest) if command == "train" else _config(rest))


def _config(arguments: list[str]) -> int:
    from crossdock.config import ConfigError, load_config, to_toml

    path, overrides = _split_path(arguments)
    try:
        print(to_toml(load_config(path, overrides)), end="")
    except ConfigError as error:
        _fail(error.field, error.value, error.valid)
    return 0


def _train(arguments: list[str]) -> int:
    machines, rest = _machine_parser().parse_known_args(arguments)
    path, overrides = _split_path(rest)

    from crossdock.checkpoint import CheckpointError
    from crossdock.config import ConfigError, load_config, validate
    from crossdock.train.data import DataError
    from crossdock.train.launch import Machines, default_nproc, run_rank, start_ranks
    from crossdock.train.trainer import TrainingStopped

    speaks = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(path, overrides)
        if "LOCAL_RANK" in os.environ:
            return run_rank(config)
        launch = Machines(
            default_nproc() if machines.nproc is None else machines.nproc,
            machines.nnodes,
            machines.node_rank,
            machines.master_addr,
            machines.master_port,
        )
        dims = validate(config, launch.world_size)
        if config.parallelism.expert_parallel_degree == -1:
            print(f"expert_parallel_degree = -1: {dims.ep} on {dims.world_size} ranks", flush=True)
        folder = Path(config.job.dump_folder or _new_run_folder(path)).absolute()
        return start_ranks(["train", *rest, "--job.dump-folder", str(folder)], launch)
    except ConfigError as error:
        _fail(error.field, error.value, error.valid, speaks=speaks)
    except DataError as error:
        _panel(str(error), speaks=speaks)
        return 2
    except (CheckpointError, TrainingStopped) as error:
        _panel(str(error), speaks=speaks)
        return 1


def _machine_parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", "--node_rank", type=int, default=0)
    parser.add_argument("--master-addr", "--master_addr", default="127.0.0.1")
    parser.add_argument("--master-port", "--master_port", type=int, default=29500)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _panel(message)
        sys.exit(2)


def _split_path(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """A first argument that is no option is the config file."""
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), arguments[1:]
    return None, arguments


def _new_run_folder(config_path: Path | None) -> Path:
    """`runs/<config>/<date-time>`, one that does not exist."""
    name = config_path.stem if config_path is not None else "default"
    first = folder = Path("runs") / name / datetime.now().strftime("%Y%m%d-%H%M%S")
    attempt = 1
    while folder.exists():
        attempt += 1
        folder = first.with_name(f"{first.name}-{attempt}")
    return folder


def _fail(field: str, value: object, valid: str, *, speaks: bool = True) -> NoReturn:
    _panel(f"{field} = {value!r}\n{valid}", speaks=speaks)
    sys.exit(2)


def _panel(message: str, *, speaks: bool = True) -> None:
    """One message for a person; of all ranks only the first speaks."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    if speaks:
        Console(stderr=True).print(Panel(Text(message), title="crossdock", title_align="left", border_style="red"))
