"""Runs whose ranks fail: one message says which rank, where and why, and no consequence hides it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from crossdock.comm import WATCHDOG_EXIT_CODE, Place
from crossdock.config import load_config
from crossdock.dispatch import RankFailure
from crossdock.experts import GroupedExperts
from crossdock.train.failures import Failure, Failures, kind_of
from crossdock.train.fingerprints import RanksDiffer, StepFingerprint, check_same_code_and_config, check_same_model
from crossdock.train.launch import train_rank
from tests.faults import Ended, run_processes
from tests.ranks import RankPool
from tests.tiny import speeches, write_assets

# Of the calls of experts in the tiny model, whose layers are two.
THIRD_STEP = 5


def train_with_a_fault(folder: str, fault: str, timeout: int) -> int:
    """A run of the real trainer; on rank 1 something happens to tokens that travel, in the third step."""
    config = load_config(
        None,
        [
            *("--job.dump-folder", f"{folder}/run", "--job.comm-timeout-seconds", str(timeout)),
            *("--model.hf-assets-path", f"{folder}/assets"),
            *("--data.source", str(speeches(f"{folder}/assets")), "--data.cache-folder", f"{folder}/cache"),
            *("--training.seq-len", "32", "--training.local-batch-size", "2", "--training.steps", "20"),
            *("--parallelism.expert-parallel-degree", "2", "--training.tuned", "off"),
        ],
    )
    calls = 0

    def before(module: nn.Module, _: Any) -> None:
        nonlocal calls
        if not isinstance(module, GroupedExperts) or os.environ["RANK"] != "1":
            return
        calls += 1
        if calls == THIRD_STEP:
            FAULTS[fault]()

    nn.modules.module.register_module_forward_pre_hook(before)
    return train_rank(config, os.environ)


def stop() -> None:
    time.sleep(2)  # the watchdog has seen where this rank is
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)


def ask_for_too_much() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def fail() -> None:
    raise KeyError("in a hook")


FAULTS = {"stop": stop, "kill": kill, "memory": ask_for_too_much, "error": fail}


def ended(folder: Path, fault: str, timeout: int = 60) -> tuple[list[Ended], str]:
    """The ranks' ends, and all that they printed to people beside the run's own lines."""
    write_assets(folder / "assets")
    ranks = run_processes(2, train_with_a_fault, str(folder), fault, timeout, folder=folder)
    return ranks, "".join(output for _, output in ranks)


def first(folder: Path) -> Failure:
    failure = Failures(folder).first()
    assert failure is not None
    return failure


def test_a_rank_that_stops_in_dispatch_is_named_with_the_layer_and_what_the_others_wait_in(
    tmp_path: Path,
) -> None:
    ranks, said = ended(tmp_path, "stop", timeout=4)
    assert [code for code, _ in ranks] == [WATCHDOG_EXIT_CODE, -signal.SIGKILL], said
    (report,) = (tmp_path / "run/faults").iterdir()
    assert said.count(report.read_text()) == 1
    assert "did not complete within 4 s: rank 1 stopped (a signal, SIGSTOP) (job.comm_timeout_seconds = 4)" in said
    assert "all_to_all, number" in said
    assert "in step 3, forward, layer model.layers.0.mlp, combine" in said
    assert "last heard of" in said
    assert "in step 3, forward, layer model.layers.0.mlp, dispatch" in said
    assert "Traceback" not in said
    cause = first(tmp_path)
    assert (cause.kind, cause.rank, cause.phase) == (
        "timeout",
        1,
        "step 3, forward, layer model.layers.0.mlp, dispatch",
    )
    assert not cause.final


def test_a_rank_that_was_killed_is_named_by_the_others(tmp_path: Path) -> None:
    ranks, said = ended(tmp_path, "kill")
    assert [code for code, _ in ranks] == [1, -signal.SIGKILL], said
    assert "the connection to another rank is gone: rank 1 gone\n" in said
    assert "in step 3, forward, layer model.layers.0.mlp, dispatch" in said
    assert "Traceback" not in said
    assert (first(tmp_path).kind, first(tmp_path).rank) == ("lost", 1)


def test_out_of_memory_is_told_once_by_its_rank_with_what_would_need_less(tmp_path: Path) -> None:
    ranks, said = ended(tmp_path, "memory")
    assert [code for code, _ in ranks] == [1, 1], said
    message = ranks[1].output
    assert "rank 1 (machine " in message
    assert "step 3, forward, layer model.layers.0.mlp, dispatch: out of memory. It asked for 1,024.0 TiB; " in message
    assert "were free" in message
    for setting in (
        "training.local_batch_size = 2",
        "training.seq_len = 32",
        "activation_checkpoint.mode = none",
        "moe.capacity_factor = 0",
    ):
        assert message.count(f"  {setting}: ") == 1
    assert said.count("out of memory") == 1
    assert "Traceback" not in said
    assert "onnection" not in said, "what other ranks lose is a consequence"
    assert (first(tmp_path).kind, first(tmp_path).rank, first(tmp_path).final) == ("memory", 1, False)


def test_an_error_of_one_rank_is_the_only_one_that_is_told(tmp_path: Path) -> None:
    ranks, said = ended(tmp_path, "error")
    assert [code for code, _ in ranks] == [1, 1], said
    assert said.count("Traceback") == 1
    assert "KeyError: 'in a hook'" in ranks[1].output
    assert (first(tmp_path).kind, first(tmp_path).message) == ("error", "KeyError: 'in a hook'")


def failure(when: float, rank: int, kind: Any) -> Failure:
    return Failure(when, rank, "host", kind, "step 1, forward", "message")


def test_the_first_cause_is_never_another_ranks_lost_connection(tmp_path: Path) -> None:
    failures = Failures(tmp_path)
    assert failures.first() is None
    failures.leave(failure(1.0, 0, "lost"))
    failures.leave(failure(1.5, 3, "lost"))
    assert failures.first() == failure(1.0, 0, "lost")
    failures.leave(failure(3.0, 2, "error"))
    failures.leave(failure(2.0, 1, "memory"))
    failures.leave(failure(2.0, 1, "memory"))
    (tmp_path / "failure-9.json").write_text("{}")
    (tmp_path / "0").touch()
    assert failures.first() == failure(2.0, 1, "memory")
    failures.clear()
    assert failures.first() is None
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"


def test_errors_are_told_apart() -> None:
    from crossdock.checkpoint import CheckpointError
    from crossdock.config import ConfigError

    assert kind_of(ConfigError("a.b", 1, "2")) == ("mistake", True)
    assert kind_of(CheckpointError("no room")) == ("error", True)
    assert kind_of(CheckpointError(f"step 3 could not be written: RuntimeError: {GLOO}")) == ("lost", False)
    assert kind_of(RuntimeError(GLOO)) == ("lost", False)
    assert kind_of(RankFailure(1, 5, 2)) == ("lost", False)
    assert kind_of(RuntimeError("Timed out waiting 60000ms for recv operation to complete")) == ("timeout", False)
    assert kind_of(MemoryError()) == ("memory", False)
    assert kind_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")) == ("memory", False)
    assert kind_of(ValueError("of a user's hook")) == ("error", False)
    wrapped = RuntimeError("stage 1 failed")
    wrapped.__cause__ = MemoryError()
    assert kind_of(wrapped) == ("memory", False)


def differ_in(what: str) -> str:
    """The message on this rank; ranks 1 and 3 of four are different."""
    odd = dist.get_rank() % 2 == 1
    config = load_config(None, ["--job.dump-folder", str(dist.get_rank())])
    if what == "config" and odd:
        config = replace(config, training=replace(config.training, seq_len=128))
    model = nn.Linear(3, 5 if what == "model" and odd else 4)
    place = Place()
    fingerprint = StepFingerprint(place)
    try:
        check_same_code_and_config(config, "0123" if what == "code" and odd else None)
        check_same_model(
            model, 7, 56 if what == "samples" and odd else 28, dist.get_rank() // 2 if what == "stage" else 0
        )
        words = fingerprint.words(step=8 if what == "step" and odd else 7, samples=28)
        sums = torch.tensor(words, dtype=torch.float64)
        dist.all_reduce(sums)
        fingerprint.check(sums.tolist())
    except RanksDiffer as error:
        return str(error)
    assert place.seconds > 0
    return "none"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "none"),
        ("config", "the ranks of this run differ\nconfig: training.seq_len is 256 on ranks 0, 2, 128 on ranks 1, 3"),
        (
            "model",
            "the ranks of this run differ\nparameter weight is float32 4x3 on ranks 0, 2, float32 5x3 on ranks 1, 3",
        ),
        ("samples", "the ranks of this run differ\nsamples read is 28 on ranks 0, 2, 56 on ranks 1, 3"),
        ("step", "the ranks of this run have come apart\nstep is 7 on ranks 0, 2, 8 on ranks 1, 3"),
    ],
)
def test_ranks_that_differ_are_named_on_all_ranks(ranks: RankPool, what: str, message: str) -> None:
    for said in ranks.run(4, differ_in, what):
        assert said.startswith(message)


def test_ranks_with_other_sources_are_named(ranks: RankPool) -> None:
    for said in ranks.run(4, differ_in, "code"):
        assert "crossdock's source files is" in said
        assert "0123 on ranks 1, 3" in said
