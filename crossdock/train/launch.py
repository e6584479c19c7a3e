"""Starting the ranks of a run on this machine, and being one of them."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from crossdock.config import Config, ConfigError, fit, validate
from crossdock.dispatch import free_deepep_buffers
from crossdock.parallel import GroupPlace
from crossdock.tools.report import note_event
from crossdock.train.agent import REGROUP_EXIT_CODE
from crossdock.train.host_memory import memory_settings
from crossdock.train.planned import memory_warning, settled_config
from crossdock.train.progress import Progress
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer
from crossdock.train.watching import RunWatch, group_timeout

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

__all__ = [
    "ENDED_FOLDER",
    "GROUP_NUMBER",
    "Machines",
    "default_nproc",
    "run_rank",
    "start_ranks",
    "tell",
    "thread_settings",
    "threads_are_open",
    "train_rank",
]

logger = logging.getLogger(__name__)

# A stopped run writes a checkpoint first; only after this is it killed.
_SHUTDOWN_SECONDS = 600
# Names the folder where each rank leaves a file when it has ended well; the launcher sets it.
ENDED_FOLDER = "CROSSDOCK_ENDED_FOLDER"
# Set for a replica group, by the launcher of them all: its number.
GROUP_NUMBER = "CROSSDOCK_REPLICA_GROUP"
# The number of threads that the launcher has chosen, where nobody else had.
_CHOSEN_THREADS = "CROSSDOCK_CHOSEN_THREADS"
# Set by the launcher where the run may go on with fewer machines.
_ELASTIC = "CROSSDOCK_ELASTIC"
# What ranks without work look for in the store, and how often: the run's exit code.
_OVER = "crossdock/over"
_SPARE_SECONDS = 0.5
_LOOPBACK = "lo"


@dataclass(frozen=True)
class Machines:
    """How many ranks run where.

    Attributes:
        nproc: ranks on this machine.
        nnodes: machines, at most.
        node_rank: this machine, from 0, which hosts the rendezvous.
        master_addr: name or address of machine 0; needed for more than one.
        master_port: a free port there.
        min_nodes: how many are enough to go on where others are lost; unset: all.

    Raises:
        ConfigError: for numbers that name no ranks.
    """

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int = 29500
    min_nodes: int | None = None

    def __post_init__(self) -> None:
        for name, value, holds, valid in (
            ("--nproc", self.nproc, self.nproc > 0, "1 or more ranks"),
            ("--nnodes", self.nnodes, self.nnodes > 0, "1 or more machines"),
            (
                "--nnodes",
                f"{self.min_nodes}:{self.nnodes}",
                self.min_nodes is None or 0 < self.min_nodes <= self.nnodes,
                "MIN:MAX with at least 1 machine, and no more than MAX",
            ),
            ("--node-rank", self.node_rank, 0 <= self.node_rank < self.nnodes, f"0 to {self.nnodes - 1}"),
            ("--master-port", self.master_port, 0 < self.master_port < 65536, "1 to 65535"),
        ):
            if not holds:
                raise ConfigError(name, value, f"must be {valid}")
        if self.nnodes > 1 and not self.master_addr:
            raise ConfigError("--master-addr", self.master_addr, "must name machine 0 where --nnodes is more than 1")

    @property
    def world_size(self) -> int:
        """Ranks on all machines."""
        return self.nproc * self.nnodes

    @property
    def is_elastic(self) -> bool:
        """Whether the run may go on with fewer machines."""
        return self.min_nodes is not None and self.min_nodes < self.nnodes


def thread_settings(nproc: int) -> dict[str, str]:
    """Environment variables that divide this machine's cores among `nproc` ranks, where nobody else has."""
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    return {"OMP_NUM_THREADS": threads, _CHOSEN_THREADS: threads}


def default_nproc() -> int:
    """One rank per GPU; two on a machine without."""
    return torch.cuda.device_count() or 2


def start_ranks(arguments: list[str], machines: Machines, max_restarts: int = 0, run_folder: Path | None = None) -> int:
    """Run `python -m crossdock ARGUMENTS` once per rank under torchrun's elastic agent, in this process.

    SIGTERM and Ctrl-C reach the ranks, which end at their next step boundary. After a failure that another start may
    mend, all ranks are started again, `max_restarts` times in a row that come no further than the run was before.

    Args:
        arguments: of each rank.
        machines: where, and how many.
        max_restarts: see above.
        run_folder: whose events tell of failures; machine 0 writes them.

    Returns:
        The exit code for this command: 0 if all ranks ended well, else that of the rank that failed first, or 128 and
        the signal's number where a stop left no checkpoint.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError

    from crossdock.train.agent import Rendezvous, run_agent

    if "OMP_NUM_THREADS" not in os.environ:
        os.environ |= thread_settings(machines.nproc)
    for name, value in memory_settings().items():
        os.environ.setdefault(name, value)
    alone = machines.nnodes == 1
    if machines.is_elastic:
        os.environ[_ELASTIC] = "1"
    rendezvous = Rendezvous(
        uuid.uuid4().hex if alone else "crossdock",
        "127.0.0.1:0" if alone else f"{machines.master_addr}:{machines.master_port}",
        is_host=None if alone else machines.node_rank == 0,
        min_nodes=machines.min_nodes or machines.nnodes,
        max_nodes=machines.nnodes,
        local_addr="127.0.0.1" if alone else None,
    )
    say = partial(_tell_of_failure, run_folder if machines.node_rank == 0 else None)
    with tempfile.TemporaryDirectory(prefix="crossdock-") as ended_folder:
        os.environ[ENDED_FOLDER] = ended_folder
        try:
            failures = run_agent(
                arguments,
                rendezvous,
                nproc=machines.nproc,
                max_restarts=max_restarts,
                folder=Path(ended_folder),
                shutdown_seconds=_SHUTDOWN_SECONDS,
                tell=say,
            )
        except SignalException as error:
            if len(list(Path(ended_folder).glob("rank-*"))) == machines.nproc:
                return 0
            without = " without a checkpoint of this moment" if arguments[0] == "train" else ""
            tell(f"stopped{without}")
            return 128 + error.sigval
        except (RendezvousError, dist.DistError) as error:
            say(_rendezvous_sentence(error, machines, arguments[0]))
            return 1
    return _exit_code(failures, say)


def _exit_code(failures: Mapping[int, ProcessFailure], say: Callable[[str], None]) -> int:
    """Of the rank that failed first; of none: 0."""
    if not failures:
        return 0
    rank, failure = min(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    if failure.exitcode > 2 or failure.exitcode < 0:
        ended = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        say(f"rank {rank} ended with {ended}; its output is above")
    return failure.exitcode if failure.exitcode > 0 else 1


def _rendezvous_sentence(error: Exception, machines: Machines, command: str) -> str:
    """What became of a run whose machines do not find one another."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

    host = f"{machines.master_addr}:{machines.master_port}"
    again = ": start the same command again on all machines; it goes on from the newest checkpoint"
    if isinstance(error, RendezvousClosedError):
        return "the run is over on the other machines"
    if isinstance(error, RendezvousTimeoutError):
        few = machines.min_nodes or machines.nnodes
        return f"fewer than {few} machines (--nnodes) have come to {host} in time"
    lost = f"the machine that hosts the rendezvous, {host}, is lost or cannot be reached"
    return lost + (again if command == "train" else "")


def tell(message: str) -> None:
    """A line of the launcher's, on stderr; that of a replica group says which."""
    print(f"crossdock: {_of_group()}{message}", file=sys.stderr, flush=True)


def _of_group() -> str:
    return f"replica group {os.environ[GROUP_NUMBER]}: " if GROUP_NUMBER in os.environ else ""


def _tell_of_failure(run_folder: Path | None, message: str) -> None:
    tell(message)
    if run_folder is not None:
        note_event(run_folder, "failure", f"{_of_group()}{message}")


def threads_are_open(environment: Mapping[str, str]) -> bool:
    """Whether a rank's number of threads is the launcher's choice, which a better one may take the place of."""
    chosen = environment.get(_CHOSEN_THREADS)
    return chosen is not None and chosen == environment.get("OMP_NUM_THREADS")


def train_rank(config: Config, environment: Mapping[str, str], in_group: GroupPlace | None = None) -> int:
    """Be one rank of a run.

    Args:
        config: with `job.dump_folder` set, on one rank at least.
        environment: torchrun's, see `run_rank`.
        in_group: place of these ranks among replica groups, where the run has some.
    """
    failures = Path(environment[ENDED_FOLDER]) if ENDED_FOLDER in environment else None
    watch = RunWatch(int(environment["RANK"]), failures)
    stop = StopSignal()
    stop.install()
    world_size, settings = int(environment["WORLD_SIZE"]), config
    with watch.leaving_failures():
        here = int(environment.get("LOCAL_WORLD_SIZE", 1))
        config, reasons = settled_config(config, world_size, here, is_elastic=_ELASTIC in environment)
        if _ELASTIC in environment:
            config, world_size = fit(config, world_size)
        dims = validate(config, world_size)
    rank = int(environment["RANK"])
    if rank >= world_size:
        return _be_spare(stop, environment)
    if config.training.deterministic:
        # cuBLAS reads it at its first product; without, torch refuses its products then.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The package's own notes, once; not those of the libraries it uses.
    notes = logging.getLogger("crossdock")
    notes.setLevel(logging.INFO)
    notes.propagate = False
    notes.addHandler(logging.StreamHandler(sys.stdout) if rank == 0 else logging.NullHandler())
    if in_group is not None and in_group.number:
        notes.setLevel(logging.WARNING)  # The first group's notes are theirs too.
    for reason in reasons:
        logger.info(reason)
    if rank == 0 and (warning := memory_warning(config, dims, here)):
        logger.warning(warning)
    first_on_machine = environment["LOCAL_RANK"] == "0"
    launchers = [folder for folder in (failures, in_group.folder if in_group else None) if folder is not None]
    progress = Progress(launchers, int(environment["LOCAL_RANK"]))

    def train(device: torch.device) -> int:
        watch.start(config)
        try:
            trainer = Trainer(
                config,
                dims,
                device,
                first_on_machine,
                stop,
                threads=threads_are_open(environment),
                settings=settings,
                progress=progress,
                machine=int(environment.get("GROUP_RANK", 0)),
                watch=watch,
                in_group=in_group,
            )
            trainer.train()
        except (Exception, SystemExit) as error:
            if not watch.failed(error, config, device):
                raise
            return 1
        finally:
            watch.stop()
        return REGROUP_EXIT_CODE if trainer.regroups else 0

    with watch.leaving_failures():
        alone = None if in_group is None else in_group.is_alone
        exit_code = run_rank(train, environment, group_timeout(config), world_size, on_loopback=alone)
    if rank == 0 and world_size < int(environment["WORLD_SIZE"]):
        _store(environment).set(_OVER, str(exit_code))
    return exit_code


def _be_spare(stop: StopSignal, environment: Mapping[str, str]) -> int:
    """Wait, as a rank that the layout has no use for, until the run ends or machines come or go; its exit code."""
    try:
        store = _store(environment)
        while not stop.requested:
            if store.check([_OVER]):
                return _ended(int(store.get(_OVER)), environment)
            time.sleep(_SPARE_SECONDS)
    except dist.DistError:  # Its machine is gone: the others begin again.
        return REGROUP_EXIT_CODE
    return _ended(REGROUP_EXIT_CODE if stop.regroups else 0, environment)


def _ended(exit_code: int, environment: Mapping[str, str]) -> int:
    """Tell the launcher that this rank has ended as it was asked to; its exit code."""
    if ENDED_FOLDER in environment:
        Path(environment[ENDED_FOLDER], f"rank-{environment['LOCAL_RANK']}").touch()
    return exit_code


def _store(environment: Mapping[str, str]) -> dist.TCPStore:
    """This start's, as its launchers have made it."""
    return dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)


def run_rank(
    action: Callable[[torch.device], int],
    environment: Mapping[str, str],
    timeout_seconds: int = 600,
    world_size: int | None = None,
    *,
    on_loopback: bool | None = None,
) -> int:
    """Be one rank: `action(device)` within a process group; returns its exit code.

    Args:
        action: what all ranks do.
        environment: torchrun's: `RANK`, `LOCAL_RANK`, `WORLD_SIZE` and those that `init_process_group` reads.
        timeout_seconds: of every collective.
        world_size: ranks that take part, where not all do.
        on_loopback: whether they talk to ranks of this machine alone; by default where all are on it.
    """
    local_rank = int(environment["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"] if on_loopback is None else on_loopback:
        _stay_on_loopback()
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        timeout=timedelta(seconds=timeout_seconds),
        rank=int(environment["RANK"]),
        world_size=world_size or int(environment["WORLD_SIZE"]),
    )
    exit_code = action(device)
    if exit_code in (0, REGROUP_EXIT_CODE):
        # A process that leaves while another still talks to it can make that one abort.
        dist.barrier()
        free_deepep_buffers()
        dist.destroy_process_group()
        _ended(exit_code, environment)
    else:
        # At exit, to free them would wait for ranks that are gone.
        free_deepep_buffers(destroy=False)
    return exit_code


def _stay_on_loopback() -> None:
    """Have the ranks of one machine listen where nobody else can connect: gloo and NCCL ask no one who they are.

    Whoever has chosen an interface keeps it.
    """
    if _LOOPBACK in (name for _, name in socket.if_nameindex()):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, _LOOPBACK)
