"""Two launchers on the loopback address stand for two machines; one is killed, and its memory is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_launch import ROOT, SECONDS, free_port
from tests.tiny import write_assets

pytestmark = pytest.mark.slow

STEPS, SNAPSHOT_INTERVAL = 40, 5


class Machine:
    """A launcher of two ranks, in a process group of its own, with a memory of its own."""

    def __init__(self, folder: Path, number: int, port: int, nnodes: str, batch: int = 2, ep: int = 4) -> None:
        self.memory = folder / f"memory-{number}"
        self.memory.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
        environment |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.log = open(folder / f"log-{number}", "a")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "crossdock", "train", "--nproc", "2", "--nnodes", nnodes),
                *("--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("--model.hf-assets-path", str(folder / "assets"), "--data.source", str(folder / "speeches")),
                *("--data.cache-folder", str(folder / "cache"), "--job.dump-folder", str(folder / "run")),
                *("--training.steps", str(STEPS), "--training.seq-len", "32"),
                *("--training.local-batch-size", str(batch), "--parallelism.expert-parallel-degree", str(ep)),
                *("--training.tuned", "off", "--checkpoint.interval", "0"),
                *("--checkpoint.no-last-save-in-hf", "--job.comm-timeout-seconds", "20"),
                *("--fault-tolerance.snapshot-interval", str(SNAPSHOT_INTERVAL)),
                *("--fault-tolerance.snapshot-folder", str(self.memory)),
            ],
            cwd=folder,
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def lose(self) -> None:
        """Kill the launcher and its ranks at once, and forget what its memory held."""
        os.killpg(self.process.pid, signal.SIGKILL)
        children = subprocess.run(
            ["pkill", "-9", "-f", str(self.memory)], check=False
        )  # the ranks, which torch starts in sessions of their own
        assert children.returncode in (0, 1)
        self.process.wait()
        shutil.rmtree(self.memory)

    def output(self) -> str:
        return Path(self.log.name).read_text(errors="replace")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    write_assets(tmp_path / "assets")
    yield tmp_path
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)], check=False)


def steps_done(folder: Path) -> list[float]:
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("}")]


def wait_for_steps(folder: Path, steps: int, *machines: Machine) -> None:
    deadline = time.monotonic() + SECONDS
    while len(steps_done(folder)) < steps:
        assert time.monotonic() < deadline, [machine.output() for machine in machines]
        for machine in machines:
            assert machine.process.poll() is None, machine.output()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_assets(folder / "assets")
    port = free_port()
    machines = [Machine(folder, number, port, "2") for number in range(2)]
    for machine in machines:
        assert machine.process.wait(SECONDS) == 0, machine.output()
    return steps_done(folder)


def test_a_machine_that_comes_back_without_its_memory_gets_it_from_its_partner(
    folder: Path, undisturbed: list[float]
) -> None:
    port = free_port()
    machines = [Machine(folder, number, port, "2") for number in range(2)]
    wait_for_steps(folder, 3 * SNAPSHOT_INTERVAL + 2, *machines)
    machines[1].lose()
    again = Machine(folder, 1, port, "2")
    for machine in (machines[0], again):
        assert machine.process.wait(SECONDS) == 0, machine.output()
    assert "from a snapshot in memory" in machines[0].output() + again.output()
    assert steps_done(folder) == undisturbed
    assert not list((folder / "memory-0").iterdir()), "removed at a clean end"


def test_a_run_goes_on_with_fewer_machines(folder: Path, undisturbed: list[float]) -> None:
    port = free_port()
    machines = [Machine(folder, number, port, "1:2") for number in range(2)]
    wait_for_steps(folder, 3 * SNAPSHOT_INTERVAL + 2, *machines)
    machines[1].lose()
    assert machines[0].process.wait(SECONDS) == 0, machines[0].output()
    output = machines[0].output()
    assert "from a snapshot in memory" in output
    assert "on 2 ranks (ep 2, ep_shard 1)" in output
    assert steps_done(folder) == pytest.approx(undisturbed, rel=1e-4), "the same samples in the same order"


def test_ranks_that_the_layout_has_no_use_for_wait_and_end_with_the_others(folder: Path) -> None:
    # Six samples per step divide over three of the four ranks that are left.
    port = free_port()
    machines = [Machine(folder, number, port, "2:3", batch=1, ep=6) for number in range(3)]
    wait_for_steps(folder, SNAPSHOT_INTERVAL + 2, *machines)
    machines[2].lose()
    for machine in machines[:2]:
        assert machine.process.wait(SECONDS) == 0, machine.output()
    assert "on 3 ranks (ep 3, ep_shard 1)" in machines[0].output() + machines[1].output()
    assert len(steps_done(folder)) == STEPS


def test_the_loss_of_the_rendezvous_host_ends_the_run_with_a_sentence(folder: Path) -> None:
    port = free_port()
    machines = [Machine(folder, number, port, "1:2") for number in range(2)]
    wait_for_steps(folder, SNAPSHOT_INTERVAL + 2, *machines)
    machines[0].lose()
    assert machines[1].process.wait(SECONDS) == 1
    output = machines[1].output()
    assert f"the machine that hosts the rendezvous, 127.0.0.1:{port}, is lost" in output
