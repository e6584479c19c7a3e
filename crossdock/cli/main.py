"""The command line. Exit codes: 0 done or stopped as asked, 2 a mistake of the user's (one message), else a failure."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from crossdock import __version__
from crossdock.cli.bench import bench_command
from crossdock.cli.common import check_gpus, fail, is_rank, machine_options, machines_of, split_path
from crossdock.cli.completion import completion_command
from crossdock.cli.convert import convert_command
from crossdock.cli.doctor import doctor_command
from crossdock.cli.model import evaluate_command, export_command, generate_command
from crossdock.cli.plan import plan_command
from crossdock.cli.report import report_command
from crossdock.cli.tune import tune_command

if TYPE_CHECKING:
    from crossdock.config import Config

__all__ = ["COMMANDS", "main"]

_USAGE = """\
crossdock: expert parallelism for PyTorch

  crossdock train  [CONFIG.toml] [--section.key value ...]   train a Mixture-of-Experts model
  crossdock config [CONFIG.toml] [--section.key value ...]   print the resolved settings as TOML
  crossdock generate MODEL --prompt TEXT [--chat]            continue a text, or answer it
  crossdock eval MODEL --data FILE                           loss and perplexity on a text
  crossdock export RUN DESTINATION                           write a folder that transformers loads
  crossdock convert SRC DST                                  Hugging Face's format to a run folder, and back
  crossdock report RUN [RUN...] [--output FILE] [--watch]    the report of a run, RUN/report.html, of several, or live
  crossdock tune   [CONFIG.toml] [--section.key value ...]   measure settings that are left open, for `train` to take
  crossdock bench  [--simulate --ranks N] [--experts E]      ways of moving tokens, beside a plain all-to-all
  crossdock plan   [CONFIG.toml] --gpus N --gpu NAME         what a run would take: memory, bytes, time, best layout
  crossdock doctor                                           what this machine is, what works on it, a test of its ranks
  crossdock completion bash | zsh | fish                     a script that completes all of this in your shell
  crossdock --version

MODEL is a run folder (its newest checkpoint), one of its checkpoints, or a folder in Hugging Face's format. generate,
eval, export, convert, report, tune, bench, plan and doctor have a --help of their own.

Ranks are started here, one per GPU or two on a machine without. Several machines run the same command:
  --nproc N          ranks on this machine
  --nnodes N         machines (1); MIN:MAX goes on with fewer where some are lost
  --node-rank N      this machine, from 0 (0)
  --master-addr A    name or address of machine 0
  --master-port P    a free port there (29500)

CONFIG.toml may be the name of a configuration that comes with crossdock: debug, qwen3_10b_a1b, qwen3_30b_a3b,
qwen3_235b_a22b; `crossdock config debug` prints it. crossdock train --help lists all settings; --profile is short for
--profiling.enable-profiling. Without CONFIG.toml, a --job.dump-folder that holds a run goes on with that run's
settings. config checks the layout as well where --nproc tells the number of ranks.

examples
  crossdock train debug --training.steps 20
  crossdock train configs/debug.toml --nproc 4 --parallelism.expert-parallel-degree 4
"""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of `crossdock` and `python -m crossdock`."""
    try:
        try:
            _main(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # Whoever reads has seen enough, as in `crossdock train --help | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno != errno.ENOSPC or not _is_full(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(f"the output cannot be written: {error.strerror}")


def _is_full(stream: TextIO) -> bool:
    """Whether it is the stream that has no space left, and not some file of the command's."""
    try:
        print(file=stream, flush=True)
    except OSError:
        return True
    return False


def _main(arguments: list[str]) -> NoReturn:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("", "-h", "--help", "help"):
        print(_USAGE, end="", file=sys.stdout if command else sys.stderr)
        sys.exit(0 if command else 2)
    if command == "--version":
        print(f"crossdock {__version__}")
        sys.exit(0)
    if command not in COMMANDS:
        fail(f"command = {command!r}\none of {', '.join(COMMANDS)}, --version, --help")
    options, rest = machine_options(rest)
    try:
        sys.exit(COMMANDS[command](rest, options))
    except ValueError as error:
        from crossdock.config import ConfigError  # Takes seconds, which a page of help need not wait for.

        if not isinstance(error, ConfigError):
            raise
        fail(f"{error.field} = {error.value!r}\n{error.valid}")


def _config(arguments: list[str], options: argparse.Namespace) -> int:
    from crossdock.config import check_settings, load_config, ranks_per_group, to_toml, validate

    config = load_config(*split_path(arguments), command="config")
    if options.nproc is None:
        check_settings(config)
    else:
        from crossdock.train.planned import settled_config

        machines = machines_of(options)
        ranks = ranks_per_group(config, machines.nproc, machines.nnodes)
        settled, _ = settled_config(config, ranks, machines.nproc, is_elastic=machines.is_elastic)
        validate(settled, ranks, machines.nproc)
    print(to_toml(config), end="")
    return 0


def _train(arguments: list[str], options: argparse.Namespace) -> int:
    arguments = ["--profiling.enable-profiling" if word == "--profile" else word for word in arguments]
    path, overrides = split_path(arguments)

    from crossdock.checkpoint import CheckpointError
    from crossdock.config import ConfigError, fit, load_config, ranks_per_group, validate, with_settled_batch
    from crossdock.data import DataError
    from crossdock.train.groups import group_place, is_in_group, start_groups
    from crossdock.train.launch import ENDED_FOLDER, start_ranks, train_rank
    from crossdock.train.planned import settled_config
    from crossdock.train.trainer import TrainingStopped

    try:
        config = load_config(path, overrides)
        if is_rank():
            # Our launcher has named the folder, on the first machine, whose ranks need not be the first ones.
            first = ENDED_FOLDER not in os.environ and os.environ["RANK"] == "0"
            place = group_place(config, os.environ)
            return train_rank(_with_run_folder(config, path, first=first), os.environ, place)
        machines = machines_of(options)
        begins = not is_in_group(os.environ)
        ranks = ranks_per_group(config, machines.nproc, machines.nnodes) if begins else machines.nproc
        # Its ranks choose anew what is left open, and say why.
        config, _ = settled_config(config, ranks, machines.nproc, is_elastic=machines.is_elastic)
        dims = validate(config, ranks, machines.nproc)
        check_gpus(machines, config.training.dtype)
        if begins and config.parallelism.expert_parallel_degree == -1:
            print(f"expert_parallel_degree = -1: {dims.ep} on {dims.world_size} ranks", flush=True)
        arguments = ["train", *arguments]
        if machines.is_elastic:
            config = with_settled_batch(config, dims)
            arguments += ["--training.global-batch-size", str(config.training.global_batch_size)]
            fit(config, machines.nproc * (machines.min_nodes or 1))
        if begins and config.fault_tolerance.replica_groups and machines.nnodes > 1 and not config.job.dump_folder:
            raise ConfigError("job.dump_folder", "", "must name a folder that all machines of replica groups share")
        config = _with_run_folder(config, path, first=machines.node_rank == 0)
        arguments += ["--job.dump-folder", config.job.dump_folder]
        if begins and config.fault_tolerance.replica_groups:
            if machines.is_elastic:
                raise ConfigError("--nnodes", options.nnodes, "must be one number with fault_tolerance.replica_groups")
            return start_groups(arguments, config, machines)
        return start_ranks(arguments, machines, config.fault_tolerance.max_restarts, Path(config.job.dump_folder))
    except DataError as error:
        fail(str(error))
    except (CheckpointError, TrainingStopped) as error:
        fail(str(error), exit_code=1)


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


COMMANDS = {
    "train": _train,
    "config": _config,
    "generate": generate_command,
    "eval": evaluate_command,
    "export": export_command,
    "convert": convert_command,
    "report": report_command,
    "tune": tune_command,
    "bench": bench_command,
    "plan": plan_command,
    "doctor": doctor_command,
    "completion": lambda arguments, _: completion_command(arguments, COMMANDS),
}
