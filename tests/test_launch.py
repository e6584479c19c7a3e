"""docs/launch.md and examples/launch: the commands are accepted, those that can run here train."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import crossdock.train.launch as launch
from crossdock.cli import main
from crossdock.config import load_config, validate
from tests.blocks import commands_of
from tests.tiny import write_assets

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "examples/launch/slurm.sbatch"
# As long as a busy machine may need.
SECONDS = 180


def doc_commands(start: str) -> list[list[str]]:
    """The words of the commands in the document that begin so; without comments."""
    return [shlex.split(command) for command in commands_of("docs/launch.md", start)]


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`accepted(words)`: what `crossdock WORDS` would have launched on a machine with 8 GPUs."""
    started: list[tuple[list[str], launch.Machines]] = []

    def start_ranks(arguments: list[str], machines: launch.Machines, *_: object) -> int:
        started.append((arguments, machines))
        return 0

    def call(words: list[str]) -> tuple[list[str], launch.Machines]:
        with pytest.raises(SystemExit) as exited:
            main([word.replace("/shared/", f"{tmp_path}/").replace("/runs/", f"{tmp_path}/runs/") for word in words])
        assert exited.value.code == 0, words
        return started.pop()

    monkeypatch.setattr(launch, "start_ranks", start_ranks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "CONFIG.toml").symlink_to(ROOT / "configs/qwen3_30b_a3b.toml")
    monkeypatch.chdir(tmp_path)
    return call


def test_the_documents_crossdock_commands_are_accepted(accepted: Any) -> None:
    commands = doc_commands("crossdock train")
    assert len(commands) >= 6
    for command in commands:
        _, machines = accepted(command[1:])
        assert machines.nnodes == (2 if "--nnodes" in command else 1)


def test_the_documents_script_commands_ask_for_valid_settings() -> None:
    commands = doc_commands(r"(?:\w+=\S+ )*\./run_train\.sh")
    assert len(commands) >= 3
    for words in commands:
        script = words.index("./run_train.sh")
        variables = dict(word.split("=", 1) for word in words[:script])
        assert set(variables) <= {"CONFIG_FILE", "NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
        name = variables.get("CONFIG_FILE", "debug").replace("CONFIG.toml", "qwen3_30b_a3b")
        config = load_config(ROOT / f"configs/{name}.toml", [*words[script + 1 :], "--job.dump-folder="])
        validate(config, int(variables.get("NNODES", 1)) * int(variables.get("NGPU", 8)))


def tiny_run(folder: Path) -> list[str]:
    """Settings of a run of seconds, with `CONFIG.toml` in `folder`."""
    write_assets(folder / "assets")
    (folder / "CONFIG.toml").write_text("[training]\nsteps = 3\nseq_len = 32\nlocal_batch_size = 2\n")
    return [
        *("--model.hf-assets-path", str(folder / "assets")),
        *("--data.source", str(folder / "speeches"), "--data.cache-folder", str(folder / "cache")),
        *("--parallelism.expert-parallel-degree", "2"),
    ]


def train_on_two_machines(commands: list[list[str]], folder: Path) -> list[dict[str, Any]]:
    """Run a command per machine at once over the loopback address; the lines of metrics.jsonl."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    try:
        for machine in machines:
            output, _ = machine.communicate(timeout=SECONDS)
            assert machine.returncode == 0, output
    finally:
        for machine in machines:
            machine.kill()
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.slow
def test_the_documents_torchrun_command_trains_on_two_machines(tmp_path: Path) -> None:
    (command,) = doc_commands("torchrun ")
    port = free_port()
    here = {"8": "1", "HOST:29500": f"127.0.0.1:{port}", "/shared/run": str(tmp_path / "run")}
    words = [here.get(word, word) for word in command[1:]]
    assert words[words.index("--nnodes") + 1] == "2"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1", *words]
    lines = train_on_two_machines([[*torchrun, *tiny_run(tmp_path)]] * 2, tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["tokens"] == 2 * 2 * 32, "two ranks"


@pytest.mark.slow
def test_the_documents_crossdock_command_trains_on_two_machines(tmp_path: Path) -> None:
    port = str(free_port())
    commands = [command for command in doc_commands("crossdock train") if "/shared/run" in command]
    here = {"HOST": "127.0.0.1", "/shared/run": str(tmp_path / "run")}
    start = [sys.executable, "-m"]
    more = ["--nproc", "1", "--master-port", port, *tiny_run(tmp_path)]
    lines = train_on_two_machines(
        [[*start, *(here.get(word, word) for word in command), *more] for command in commands], tmp_path
    )
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["tokens"] == 2 * 2 * 32, "two ranks"


# Stand-ins for SLURM's commands: two nodes on this machine, and a record of what was asked for.
SLURM = {
    "scontrol": 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; else echo "$*" >>"$RECORD/scontrol"; fi',
    "scancel": 'echo "$*" >>"$RECORD/scancel"; touch "$RECORD/stop"',
    "srun": """while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" & touch "$RECORD/started"
wait -n; first=$?; wait -n && exit "$first" """,
    "crossdock": """printf '%s\\0' "$@" >"$RECORD/node$SLURM_NODEID"
if [[ -e $RECORD/long ]]; then while [[ ! -e $RECORD/stop ]]; do sleep 0.05; done; fi
exit "$(cat "$RECORD/code" 2>/dev/null || echo 0)" """,
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script, in `tmp_path` with the stand-ins."""
    for name, text in SLURM.items():
        path = tmp_path / (".venv/bin" if name == "crossdock" else "bin") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "record").mkdir()
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
    }


def test_the_batch_script_starts_a_launcher_per_node(slurm: dict[str, str], tmp_path: Path, accepted: Any) -> None:
    for words in doc_commands("sbatch "):
        arguments = words[words.index("examples/launch/slurm.sbatch") + 1 :]
        subprocess.run([SBATCH, *arguments], cwd=tmp_path, env=slurm, check=True, timeout=SECONDS)
        for node in (0, 1):
            started = (tmp_path / f"record/node{node}").read_text().split("\0")[:-1]
            ranks, machines = accepted(started)
            assert machines == launch.Machines(8, 2, node, "node1")
            config = load_config(Path(ranks[1]), ranks[2:])
            assert config.job.dump_folder == str(tmp_path / "runs/slurm-17"), "the same when it is queued again"
    assert not (tmp_path / "record/scontrol").exists(), "a run that has ended is not queued again"


def test_the_batch_script_passes_on_the_end_of_its_time_and_is_queued_again(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    record = tmp_path / "record"
    (record / "long").touch()
    script = subprocess.Popen([SBATCH, "configs/some.toml"], cwd=tmp_path, env=slurm)
    deadline = time.monotonic() + SECONDS
    while not (record / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert script.wait(SECONDS) == 0
    assert (record / "scancel").read_text() == "--signal=TERM 17\n"
    assert (record / "scontrol").read_text() == "requeue 17\n"


def test_the_batch_script_ends_with_the_code_of_a_run_that_failed(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "record/code").write_text("3")
    ended = subprocess.run([SBATCH, "configs/some.toml"], cwd=tmp_path, env=slurm, check=False, timeout=SECONDS)
    assert ended.returncode == 3
    assert not (tmp_path / "record/scontrol").exists()


def test_the_pods_of_the_indexed_job_are_accepted(slurm: dict[str, str], tmp_path: Path, accepted: Any) -> None:
    service, claim, job = yaml.safe_load_all((ROOT / "examples/launch/indexed_job.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] == 2
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    for index in range(spec["completions"]):
        given = {"JOB_COMPLETION_INDEX": str(index), "SLURM_NODEID": f"-job{index}"}
        environment = slurm | given | {"PATH": f".venv/bin:{slurm['PATH']}"}
        subprocess.run(container["command"], cwd=tmp_path, env=environment, check=True, timeout=SECONDS)
        _, machines = accepted((tmp_path / f"record/node-job{index}").read_text().split("\0")[:-1])
        first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert machines == launch.Machines(8, spec["completions"], index, first, 29500)


def test_the_pods_of_the_kubernetes_job_are_accepted(slurm: dict[str, str], tmp_path: Path, accepted: Any) -> None:
    claim, job = yaml.safe_load_all((ROOT / "examples/launch/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    pods = [spec["template"]["spec"] for spec in replicas.values() for _ in range(spec["replicas"])]
    for rank, pod in enumerate(pods):
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "the operator's condition"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        operator = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "crossdock-master-0", "MASTER_PORT": "23456"}
        environment = slurm | operator | {"SLURM_NODEID": f"-pod{rank}", "PATH": f".venv/bin:{slurm['PATH']}"}
        subprocess.run(container["command"], cwd=tmp_path, env=environment, check=True, timeout=SECONDS)
        _, machines = accepted((tmp_path / f"record/node-pod{rank}").read_text().split("\0")[:-1])
        assert machines == launch.Machines(8, len(pods), rank, "crossdock-master-0", 23456)
