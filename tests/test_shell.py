"""The commands around training: doctor, completion, help; as a person types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crossdock.cli.main import COMMANDS
from crossdock.tools.doctor import checkup
from tests.ranks import RankPool

SECONDS = 120


def crossdock(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "NO_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "crossdock", *arguments],
        env=plain | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_doctor_names_the_machine_what_is_missing_and_tests_the_ranks() -> None:
    done = crossdock("doctor", "--nproc", "2", COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    for named in ("torch_commit", "triton", "numpy", "deep_ep", "nvshmem", "driver", "cudnn"):
        assert re.search(rf"^ {named} ", done.stdout, re.MULTILINE), named
    assert re.search(r"dispatcher +deepep +no +needs GPUs of SM90", done.stdout)
    assert "test over 2 ranks" in done.stdout
    assert re.search(r"dispatcher alltoall: as one process", done.stdout)
    assert re.search(r"all-to-all: \d", done.stdout)
    assert done.stdout.endswith("all well\n")


def test_doctor_as_json_is_one_document() -> None:
    done = crossdock("doctor", "--nproc", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"]
    assert found["machine"]["cores"] >= 1
    problems = {each["name"]: each["problem"] for each in found["findings"] if each["group"] == "dispatcher"}
    assert problems["alltoall"] == ""


def test_a_dispatcher_that_computes_wrongly_fails_the_test(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, error, problem in ranks.run(2, _test_with_wrong_sums)[0]:
        assert name == "alltoall"
        assert error > 0.01
        assert "off by" in problem


def _test_with_wrong_sums() -> list[tuple[str, float, str]]:
    import torch

    from crossdock.dispatch import AllToAllDispatcher
    from crossdock.tools.doctor import self_test

    combine = AllToAllDispatcher.combine
    AllToAllDispatcher.combine = lambda self, y, handle: combine(self, y * 1.1, handle)  # type: ignore[method-assign]
    try:
        tested, _ = self_test(torch.device("cpu"), ["alltoall"])
    finally:
        AllToAllDispatcher.combine = combine  # type: ignore[method-assign]
    return [(each.name, each.error, each.problem) for each in tested]


def test_every_dispatcher_and_backend_is_looked_at() -> None:
    import torch

    from crossdock.dispatch import DISPATCHERS
    from crossdock.experts import EXPERTS_BACKENDS

    found = {(each.group, each.name) for each in checkup(torch.device("cpu"), 2)}
    assert {("dispatcher", name) for name in DISPATCHERS} | {("experts", name) for name in EXPERTS_BACKENDS} <= found


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = crossdock("completion", "bash")
    assert done.returncode == 0, done.stderr
    script = tmp_path_factory.mktemp("completion") / "crossdock.bash"
    script.write_text(done.stdout)
    return script


@pytest.mark.parametrize(
    ("words", "offered", "not_offered"),
    [
        (("",), {"train", "doctor", "tune"}, {"--nproc"}),
        (("tra",), {"train"}, {"tune"}),
        (("train", "--moe.disp"), {"--moe.dispatcher"}, {"--moe.experts"}),
        (("train", "--moe.dispatcher", ""), {"alltoall", "hierarchical"}, {"--moe.dispatcher"}),
        (("train", "--moe.dispatcher", "="), {"alltoall", "hierarchical"}, {"--moe.dispatcher"}),
        (("train", "--moe.dispatcher", "=", "hier"), {"hierarchical"}, {"alltoall"}),
        (("train", "de"), {"debug"}, {"qwen3_30b_a3b"}),
        (("report", ""), set(), {"debug"}),
        (("plan", "debug", "--gpu", ""), {"h200", "cpu"}, {"debug"}),
        (("train", "--n"), {"--nproc", "--nnodes"}, set()),
        (("train", "--prof"), {"--profile"}, set()),
        (("bench", "--n"), {"--nproc"}, set()),
        (("plan", "--moe.disp"), {"--moe.dispatcher"}, set()),
        (("eval", "--max"), {"--max-samples"}, set()),
        (("doctor", "--"), {"--no-test", "--json", "--help"}, {"--moe.dispatcher"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bash_completes(bash_script: Path, words: tuple[str, ...], offered: set[str], not_offered: set[str]) -> None:
    line = ["crossdock", *words]
    quoted = " ".join(f"'{word}'" for word in line)
    program = (
        f"source {bash_script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _crossdock; "
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=SECONDS, check=True)
    found = set(done.stdout.split())
    assert offered <= found
    assert not not_offered & found


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_the_same_words(shell: str) -> None:
    done = crossdock("completion", shell)
    assert done.returncode == 0, done.stderr
    assert "hierarchical" in done.stdout
    assert "max-samples" in done.stdout


def test_help_names_every_command_and_every_command_helps() -> None:
    usage = crossdock("--help")
    assert usage.returncode == 0
    for command in COMMANDS:
        assert f"crossdock {command} " in usage.stdout, command


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_s_help_goes_to_stdout_without_colours(command: str) -> None:
    done = crossdock(command, "--help", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert f"crossdock {command}" in done.stdout
    assert "\x1b[" not in done.stdout
    if command in ("train", "config"):
        assert f"Example: crossdock {command} debug" in " ".join(done.stdout.replace("│", " ").split())
    else:
        examples = done.stdout.partition("\nexamples\n")[2]
        assert examples
        assert all(f"crossdock {command}" in example for example in examples.splitlines())


def test_whoever_reads_may_stop_reading() -> None:
    command = f"{sys.executable} -m crossdock train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout.startswith("usage: crossdock train")
    assert done.stderr == ""


def test_the_command_line_is_there_before_torch() -> None:
    """So that Ctrl-C is answered by it while torch is imported, and what needs no torch is quick."""
    program = "import sys, crossdock.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=SECONDS, check=False).returncode == 0


def test_all_names_of_the_package_are_there() -> None:
    import crossdock as package

    assert {name for name in package.__all__ if not hasattr(package, name)} == set()
    with pytest.raises(AttributeError, match=r"module 'crossdock' has no attribute 'Moe'"):
        _ = package.Moe
