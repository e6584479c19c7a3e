"""`crossdock tune`: settings that a run leaves open, measured for its model, ranks and device."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from crossdock.cli.common import Parser, check_gpus, fail, is_rank, machines_of, split_path

if TYPE_CHECKING:
    import torch

    from crossdock.config import Config
    from crossdock.train.launch import Machines

__all__ = ["tune_command"]


def tune_command(arguments: list[str], options: argparse.Namespace) -> int:
    """`crossdock tune [CONFIG.toml] [--section.key value ...]`."""
    parser = Parser(
        prog="crossdock tune",
        usage="crossdock tune [CONFIG.toml] [--section.key value ...] [--seconds S] [--rounds N] [--output FILE]",
        description="Measure settings that a run leaves open, on one layer of its model over its ranks, and write "
        "which are fastest to a file that `crossdock train` takes them from. Settings, and --nproc and the like, are "
        "those of `crossdock train`.",
        examples=(
            "crossdock tune debug --seconds 60",
            "crossdock tune configs/debug.toml --nproc 2 --moe.dispatcher alltoall --output tuned.json",
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="for all settings together (300)")
    parser.add_argument("--rounds", type=int, default=7, help="in which each value is measured once, 3 or more (7)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where to (what training.tuned names)")
    lossy = "choose a narrower wire_dtype where it is faster, which changes numbers"
    parser.add_argument("--allow-lossy-wire", action="store_true", help=lossy)
    parsed, rest = parser.parse_known_args(arguments)
    if not (math.isfinite(parsed.seconds) and parsed.seconds > 0):
        parser.error("argument --seconds must be a positive number")
    if parsed.rounds < 3:
        parser.error("argument --rounds must be 3 or more")

    from crossdock.data import DataError
    from crossdock.tools.tune import SweepFailed
    from crossdock.train.launch import start_ranks

    path, overrides = split_path(rest)
    try:
        config, output = _settings(path, overrides, parsed.output)
        if is_rank():
            return _rank(config, output, parsed)
        machines = machines_of(options)
        _check(config, output, machines)
        return start_ranks(["tune", *arguments], machines)
    except DataError as error:
        fail(str(error))
    except SweepFailed as error:
        fail(str(error), exit_code=1)


def _settings(path: Path | None, overrides: list[str], output: Path | None) -> tuple[Config, Path]:
    """The settings of the run, and the file to write: it need not be there yet, as it must for the run."""
    from crossdock.config import load_config, tuned_file

    config = load_config(path, overrides)
    tuned = config.training.tuned
    named = output if output is not None else tuned_file("auto" if tuned == "off" else tuned)
    assert named is not None
    return replace(config, training=replace(config.training, tuned="off")), named.expanduser().absolute()


def _check(config: Config, output: Path, machines: Machines) -> None:
    """Everything that can be wrong, before anything is measured."""
    from crossdock.config import ConfigError, TunedFileError, check_writable, read_tuned, validate

    if config.lora.rank:
        raise ConfigError("lora.rank", config.lora.rank, "must be 0: experts with adapters are not tuned")
    validate(config, machines.world_size, machines.nproc)
    check_gpus(machines, config.training.dtype)
    try:
        if output.exists():
            read_tuned(output)
    except TunedFileError as error:
        raise ConfigError("--output", str(output), f"{error}; move it away, or name another file") from None
    check_writable("--output", str(output.parent))


def _rank(config: Config, output: Path, parsed: argparse.Namespace) -> int:
    from crossdock.config import validate
    from crossdock.tools.tune import TuneOptions, tune
    from crossdock.train.launch import run_rank, threads_are_open
    from crossdock.train.stopping import StopSignal

    stop = StopSignal()
    stop.install()
    dims = validate(config, int(os.environ["WORLD_SIZE"]))
    own_threads = threads_are_open(os.environ)
    chosen = TuneOptions(output, parsed.seconds, parsed.rounds, parsed.allow_lossy_wire, own_threads)

    def act(device: torch.device) -> int:
        tune(config, dims, device, chosen, stop_requested=lambda: stop.requested)
        return 0

    return run_rank(act, os.environ, config.job.comm_timeout_seconds)
