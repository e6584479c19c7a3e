"""The command line. Exit codes: 0 done or stopped as asked, 2 a mistake of the user's (one message), else a failure."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from crossdock import __version__

if TYPE_CHECKING:
    from crossdock.config import Config
    from crossdock.train.launch import Machines

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

crossdock train --help lists all settings. Without CONFIG.toml, a --job.dump-folder that holds a run goes on with that
run's settings. config checks the layout as well where --nproc tells the number of ranks.

examples
  crossdock train configs/debug.toml --training.steps 20
  crossdock train configs/debug.toml --nproc 4 --parallelism.expert-parallel-degree 4
"""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of `crossdock` and `python -m crossdock`."""
    try:
        _main(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _main(arguments: list[str]) -> NoReturn:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("", "-h", "--help", "help"):
        print(_USAGE, end="", file=sys.stdout if command else sys.stderr)
        sys.exit(0 if command else 2)
    if command == "--version":
        print(f"crossdock {__version__}")
        sys.exit(0)
    if command not in ("train", "config"):
        _fail(f"command = {command!r}\none of train, config, --version, --help")
    options, rest = _machine_options(rest)

    from crossdock.config import ConfigError

    try:
        sys.exit(_train(rest, options) if command == "train" else _config(rest, options))
    except ConfigError as error:
        _fail(f"{error.field} = {error.value!r}\n{error.valid}")


def _config(arguments: list[str], options: argparse.Namespace) -> int:
    from crossdock.config import check_settings, load_config, to_toml, validate

    config = load_config(*_split_path(arguments))
    if options.nproc is None:
        check_settings(config)
    else:
        validate(config, _machines(options).world_size)
    print(to_toml(config), end="")
    return 0


def _train(arguments: list[str], options: argparse.Namespace) -> int:
    path, overrides = _split_path(arguments)

    from crossdock.checkpoint import CheckpointError
    from crossdock.config import load_config, validate
    from crossdock.data import DataError
    from crossdock.train.launch import ENDED_FOLDER, run_rank, start_ranks
    from crossdock.train.trainer import TrainingStopped

    try:
        config = load_config(path, overrides)
        if _is_rank():
            # Our launcher has named the folder, on the first machine, whose ranks need not be the first ones.
            first = ENDED_FOLDER not in os.environ and os.environ["RANK"] == "0"
            return run_rank(_with_run_folder(config, path, first=first), os.environ)
        machines = _machines(options)
        dims = validate(config, machines.world_size)
        _check_gpus(config, machines)
        if config.parallelism.expert_parallel_degree == -1:
            print(f"expert_parallel_degree = -1: {dims.ep} on {dims.world_size} ranks", flush=True)
        config = _with_run_folder(config, path, first=machines.node_rank == 0)
        return start_ranks(["train", *arguments, "--job.dump-folder", config.job.dump_folder], machines)
    except DataError as error:
        _fail(str(error))
    except (CheckpointError, TrainingStopped) as error:
        _fail(str(error), exit_code=1)


def _machine_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """How many ranks run where; and the arguments that are about something else."""
    names = ("--nproc", "--nnodes", "--node-rank", "--master-addr", "--master-port")
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", "--node_rank", type=int, default=0)
    parser.add_argument("--master-addr", "--master_addr")
    parser.add_argument("--master-port", "--master_port", type=int, default=29500)
    options, rest = parser.parse_known_args(arguments)
    for argument in (argument for argument in rest if argument.startswith("--")):
        nearest = difflib.get_close_matches(argument.partition("=")[0], names, n=1, cutoff=0.75)
        if nearest:
            parser.error(f"argument {argument} does not exist; did you mean {nearest[0]}?")
    return options, rest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(message)


def _machines(options: argparse.Namespace) -> Machines:
    from crossdock.train.launch import Machines, default_nproc

    nproc = default_nproc() if options.nproc is None else options.nproc
    return Machines(nproc, options.nnodes, options.node_rank, options.master_addr, options.master_port)


def _check_gpus(config: Config, machines: Machines) -> None:
    import torch

    from crossdock.config import ConfigError

    gpus = torch.cuda.device_count()
    if gpus and machines.nproc > gpus:
        raise ConfigError("--nproc", machines.nproc, f"at most {gpus}, the GPUs of this machine")
    if gpus and config.training.dtype == "float64":
        raise ConfigError("training.dtype", "float64", "is for CPU alone; CUDA_VISIBLE_DEVICES= hides the GPUs")


def _split_path(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """A first argument that is no option is the config file."""
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), arguments[1:]
    return None, arguments


def _with_run_folder(config: Config, config_path: Path | None, *, first: bool) -> Config:
    """The settings with a run folder that exists: `job.dump_folder`, or a new `runs/<config>/<date-time>`.

    Only the `first` machine or rank makes a new one, and tells all others.
    """
    from crossdock.config import ConfigError

    given = config.job.dump_folder
    if not given and not first:
        return config
    stem = config_path.stem if config_path is not None else "default"
    new = Path("runs", stem, datetime.now().strftime("%Y%m%d-%H%M%S")).absolute()
    folder = Path(given) if given else new
    attempt = 1
    try:
        while not given and folder.exists():
            attempt += 1
            folder = new.with_name(f"{new.name}-{attempt}")
        folder.mkdir(parents=True, exist_ok=bool(given))
    except OSError as error:
        raise ConfigError("job.dump_folder", str(folder), f"must be a folder that can be made ({error})") from None
    return replace(config, job=replace(config.job, dump_folder=str(folder)))


def _is_rank() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def _fail(message: str, *, exit_code: int = 2) -> NoReturn:
    """End with one message for a person; of a machine's ranks only the first speaks."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    if not _is_rank() or os.environ["LOCAL_RANK"] == "0":
        panel = Panel(Text(message), title="crossdock", title_align="left", border_style="red")
        Console(stderr=True).print(panel)
    sys.exit(exit_code)
