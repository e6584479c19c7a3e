"""Files and disks as they should not be: each is one message that names the thing and what to do (docs/numbers.md)."""

from __future__ import annotations

import ast
import gzip
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import crossdock
from crossdock.checkpoint import CheckpointError
from crossdock.config import load_config, validate
from crossdock.data import DataError
from crossdock.parallel import local_part
from crossdock.train.stopping import StopSignal
from crossdock.train.trainer import Trainer, TrainingStopped
from tests.ranks import RankPool
from tests.tiny import speeches, write_assets, write_hf_model

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(only_rank: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> Train:
    """`train("--section.key", value, ...)` in `tmp_path/run`: the exit code, and what a person reads, on one line."""
    monkeypatch.setenv("COLUMNS", "2000")
    assets = write_assets(tmp_path / "assets")

    def run(*settings: object) -> tuple[int, str]:
        fixed = ["--model.hf-assets-path", assets, "--data.source", speeches(assets), "--training.seq-len", 32]
        fixed += ["--data.cache-folder", tmp_path / "cache", "--job.dump-folder", tmp_path / "run"]
        fixed += ["--training.steps", 3, "--training.local-batch-size", 2, "--checkpoint.no-last-save-in-hf"]
        code = only_rank("train", *fixed, *settings)
        # Groups that were left open would meet those of the next run, and so would what it was told.
        if dist.is_initialized():
            dist.destroy_process_group()
        logging.getLogger("crossdock").handlers.clear()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, " ".join((out + err).split())

    return run


def one_panel(said: str) -> bool:
    return said.count("╭") == 1


SPARSE = 10**12  # Bytes of a file with holes: more than any machine that runs this has memory for an eighth of.


def _write_file(path: Path, start: bytes, size: int = 0) -> None:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(max(size, len(start)))


BAD_FILES = {
    "empty text": ("a.txt", b"", "the file is empty"),
    "empty lines": ("a.jsonl", b"", "the file is empty"),
    "empty parquet": ("a.parquet", b"", "the file is empty"),
    "binary text": ("a.txt", bytes(range(256)) * 9, "NUL byte: the file is binary"),
    "binary lines": ("a.jsonl", bytes(range(255, 0, -1)) * 9, "is not UTF-8: the file is binary"),
    "binary parquet": ("a.parquet", os.urandom(999), "truncated, or no Parquet file"),
    "truncated lines": ("a.jsonl", b'{"text": "abc"}\n{"text": "de', "a.jsonl:2: the last line is cut off"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 99)[:-20], "the file is truncated"),
    "half a character": ("a.txt", "fellow citizens é".encode()[:-1], "ends within a character: the file is truncated"),
    "not text but an array": ("a.npy", b"\x93NUMPY", "files of this kind can't be read"),
}
ENORMOUS_FILES = {
    "text": ("a.txt", b"fellow citizens " * 100_000, "is one document of 1,000.0 GB, more than an eighth of"),
    "nothing but holes": ("a.txt", b"", "a.txt:1: holds a NUL byte: the file is binary"),
    "a line": ("a.jsonl", b'{"text": "', "a.jsonl:1: holds a NUL byte: the file is binary"),
    "parquet": ("a.parquet", b"PAR1", "truncated, or no Parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_data_file_is_named(name: str, train: Train, tmp_path: Path) -> None:
    file, content, words = BAD_FILES[name]
    _write_file(tmp_path / file, content)
    code, said = train("--data.source", tmp_path / file)
    assert code == 2
    assert one_panel(said)
    assert str(tmp_path / file) in said
    assert words in said


@pytest.mark.parametrize("name", ENORMOUS_FILES)
def test_an_enormous_file_is_refused_before_it_is_read(name: str, train: Train, tmp_path: Path) -> None:
    file, start, words = ENORMOUS_FILES[name]
    _write_file(tmp_path / file, start, SPARSE)
    code, said = train("--data.source", tmp_path / file)
    assert code == 2
    assert one_panel(said)
    assert str(tmp_path / file) in said
    assert words in said


def test_an_endless_line_is_refused_before_it_is_read_whole(tmp_path: Path, train: Train, monkeypatch: Any) -> None:
    memory = 80 * 2**20
    pages = {"SC_PHYS_PAGES": memory // 4096, "SC_PAGE_SIZE": 4096}
    real = os.sysconf
    monkeypatch.setattr("crossdock.data.files.os.sysconf", lambda name: pages.get(name) or real(name))
    line = b'{"text": "' + b"x" * (memory // 4)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "short"}\n' + line)
    code, said = train("--data.source", tmp_path / "a.jsonl")
    assert code == 2
    assert "a.jsonl:2: the line has more than an eighth of this machine's memory" in said


def _spoil_tokens(cache: Path, token: int) -> Path:
    (path,) = cache.glob("*/train/tokens.bin")
    tokens = np.memmap(path, dtype="uint16", mode="r+")
    tokens[::7] = token
    tokens.flush()
    return path


@pytest.mark.parametrize("which", ["train", "held_out"])
def test_a_token_beyond_the_vocabulary_names_the_file(train: Train, tmp_path: Path, which: str) -> None:
    validating = ["--data.held-out", 0.2, "--validation.interval", 1, "--validation.max-samples", 8]
    assert train("--training.steps", 1, *validating)[0] == 0
    (path,) = (tmp_path / "cache").glob(f"*/{which}/tokens.bin")
    tokens = np.memmap(path, dtype="uint16", mode="r+")
    tokens[::7] = 60000
    tokens.flush()
    code, said = train(*validating)
    assert code == 2
    assert one_panel(said)
    assert f"{path} is damaged: it holds the token 60000, beyond its vocabulary of" in said
    assert f"remove the folder {path.parent.parent}" in said
    shutil.rmtree(path.parent.parent)
    assert train(*validating)[0] == 0, "as it was told"


def _trainer(assets: str, run_folder: str, cache: str, settings: list[str]) -> Trainer:
    fixed = ["--model.hf-assets-path", assets, "--job.dump-folder", run_folder, "--training.tuned", "off"]
    fixed += ["--data.source", str(speeches(assets)), "--data.cache-folder", cache, "--training.seq-len", "32"]
    fixed += ["--training.local-batch-size", "2", "--checkpoint.no-last-save-in-hf", "--training.steps", "6"]
    config = load_config(None, [*fixed, "--parallelism.expert-parallel-degree", "2", *settings])
    dims = validate(config, dist.get_world_size())
    return Trainer(config, dims, torch.device("cpu"), dist.get_rank() == 0, StopSignal())


def _run(assets: str, run_folder: str, cache: str, settings: list[str]) -> str:
    """What ended the run; empty where it was done."""
    try:
        _trainer(assets, run_folder, cache, settings).train()
    except (CheckpointError, DataError, TrainingStopped) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _read_bad_tokens(assets: str, run_folder: str, cache: str) -> str:
    trainer = _trainer(assets, run_folder, cache, [])
    read = trainer.batches.at

    def at(first: int, *group: int) -> Any:
        if first >= 8 and dist.get_rank() == 1:
            raise DataError("tokens.bin is damaged")
        return read(first, *group)

    object.__setattr__(trainer.batches, "at", at)
    try:
        trainer.train()
    except DataError as error:
        return str(error)
    return ""


def test_data_that_one_rank_cannot_read_ends_all_with_its_message(ranks: RankPool, tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets")
    arguments = (str(assets), str(tmp_path / "run"), str(tmp_path / "cache"))
    assert ranks.run(2, _read_bad_tokens, *arguments) == ["tokens.bin is damaged"] * 2


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (EXPERT, torch.nan, "holds NaN"),
        ("model.layers.0.self_attn.k_proj.weight", torch.inf, "holds infinity"),
        ("model.norm.weight", -torch.inf, "holds infinity"),
    ],
)
def test_nan_in_the_weights_that_a_run_starts_from_is_named(
    train: Train, tmp_path: Path, name: str, value: float, words: str
) -> None:
    model = write_hf_model(tmp_path / "assets")
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    code, said = train("--checkpoint.initial-load-in-hf")
    assert code == 1
    assert one_panel(said)
    assert f"the weights in {model} are damaged: {name} {words}" in said


def _spoil_a_checkpoint(assets: str, run_folder: str, cache: str, which: str) -> str:
    """Save a run with NaN in one rank's part of a tensor, and go on with it: what is said."""
    trainer = _trainer(assets, run_folder, cache, ["--training.steps", "2"])
    parameter = dict(trainer.model.named_parameters())["model.layers.1.mlp.experts.down_projs"]

    def spoil(*_: Any) -> None:
        if dist.get_rank() == 1:
            tensor = parameter if which == "weight" else trainer.optimizer.state[parameter]["exp_avg"]
            local_part(tensor.detach())[0, 0, 0] = torch.nan

    finish = trainer.keeper.finish
    trainer.keeper.finish = lambda *arguments: (spoil(), finish(*arguments))[1]  # type: ignore[method-assign]
    trainer.train()
    dist.barrier()
    return _run(assets, run_folder, cache, [])


@pytest.mark.parametrize("which", ["weight", "moment"])
def test_nan_in_a_checkpoint_that_a_run_goes_on_from_is_named(ranks: RankPool, tmp_path: Path, which: str) -> None:
    assets = write_assets(tmp_path / "assets")
    arguments = (str(assets), str(tmp_path / "run"), str(tmp_path / "cache"), which)
    first, second = ranks.run(2, _spoil_a_checkpoint, *arguments)
    assert first == second
    kind = "model" if which == "weight" else "optimizer.exp_avg"
    assert f"step-00000002: {kind}.model.layers.1.mlp.experts.down_projs.4 holds NaN" in first


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def _fill_the_disk(
    assets: str, run_folder: str, cache: str, settings: list[str], full_at: int, free_at: int
) -> tuple[str, int]:
    """Train while there is no room on the disk after step `full_at` until after `free_at`; what ended it, and where."""
    trainer = _trainer(assets, run_folder, cache, settings)
    ballast = Path(run_folder).parent / "ballast"

    def fill(*_: Any) -> None:
        if trainer.step == full_at and dist.get_rank() == 0 and not ballast.exists():
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 4096) == 4096:
                        pass
                except OSError:
                    pass
        if trainer.step == free_at and dist.get_rank() == 0:
            ballast.unlink(missing_ok=True)

    trainer.model.register_forward_pre_hook(fill)
    try:
        trainer.train()
    except (CheckpointError, TrainingStopped) as error:
        return str(error), trainer.step
    return "", trainer.step


def _steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_full_disk(ranks: RankPool, tmp_path: Path, small_disk: Path, mode: str, policy: str) -> None:
    """The checkpoint before stays whole, the run ends with an error, or goes on and tries again; metrics likewise."""
    assets = write_assets(tmp_path / "assets")
    settings = ["--checkpoint.interval", "2", "--checkpoint.keep-latest-k", "2", "--checkpoint.async-mode", mode]
    settings += ["--fault-tolerance.on-write-error", policy]
    run = small_disk / "run"
    arguments = (str(assets), str(run), str(tmp_path / "cache"), settings, 3, 5 if policy == "warn" else -1)
    results = ranks.run(2, _fill_the_disk, *arguments)
    message, step = results[0]
    assert results[1] == (message, step), "all ranks end alike"
    checkpoints = sorted(path.name for path in (run / "checkpoint").glob("step-*"))
    if policy == "warn":
        assert (message, step) == ("", 6)
        assert _steps(run) == [1, 2, 3, 4, 5, 6], "metrics of the steps without room were written later"
        assert checkpoints == ["step-00000002", "step-00000006"]
        return
    assert "No space left on device" in message
    assert str(small_disk) in message
    assert "step-00000002" in checkpoints
    assert _steps(run) == list(range(1, len(_steps(run)) + 1))
    (small_disk / "ballast").unlink()
    assert ranks.run(2, _run, *arguments[:4]) == ["", ""], "it goes on from the checkpoint before"
    assert _steps(run) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_cannot_write_its_metrics_is_no_success(train: Train, tmp_path: Path, small_disk: Path) -> None:
    """Even where its last checkpoint is whole, elsewhere."""
    run, elsewhere = small_disk / "run", tmp_path / "elsewhere"
    assert train("--job.dump-folder", run, "--training.steps", 1)[0] == 0
    shutil.copytree(run / "checkpoint", elsewhere)
    subprocess.run(["mount", "--bind", elsewhere, run / "checkpoint"], check=True)
    try:
        room = os.statvfs(small_disk)
        with open(small_disk / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, (room.f_bavail - 6) * room.f_bsize)
        code, said = train("--job.dump-folder", run, "--training.steps", 60)
    finally:
        subprocess.run(["umount", "-l", run / "checkpoint"], check=True)
    assert code == 1
    assert f"cannot write below {run}: No space left on device. Make room, and start again" in said
    assert 1 < len(_steps(run)) < 60
    assert f"step-{len(_steps(run)) + 1:08d}" in [path.name for path in elsewhere.iterdir()]


def test_no_room_for_tokens_names_the_cache(train: Train, small_disk: Path) -> None:
    with open(small_disk / "ballast", "wb") as file:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, 3 * 2**20 - 16384)
    code, said = train("--data.cache-folder", small_disk / "cache")
    assert code == 1
    assert one_panel(said)
    assert str(small_disk / "cache") in said
    assert "No space left on device" in said


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "checkpoint"])
def test_a_folder_in_the_place_of_a_file_is_named(train: Train, tmp_path: Path, name: str) -> None:
    """And the other way round."""
    assert train("--training.steps", 1)[0] == 0
    path = tmp_path / "run" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.touch() if name == "checkpoint" else path.mkdir()
    code, said = train("--training.steps", 2)
    assert code == 1
    assert one_panel(said)
    assert str(path) in said


WITHOUT_RIGHTS = """
import os, sys
import crossdock.train.launch, crossdock.train.trainer, transformers.models.qwen3_moe.modeling_qwen3_moe
from crossdock.cli import main
os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
main(sys.argv[1:])
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter: pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody without rights")
@pytest.mark.parametrize(
    ("hidden", "words"), [("data", "Permission denied"), ("run", "must be a folder that you may write to")]
)
def test_a_file_that_may_not_be_read_or_written_is_named(hidden: str, words: str, open_folder: Path) -> None:
    folder = open_folder
    assets = write_assets(folder / "assets")
    for name in ("run", "cache"):
        (folder / name).mkdir(mode=0o777)
        (folder / name).chmod(0o777)
    (folder / "data.txt").write_text("fellow citizens " * 200)
    (folder / "data.txt").chmod(0o600 if hidden == "data" else 0o644)
    if hidden == "run":
        (folder / "run").chmod(0o755)
    command = [sys.executable, "-c", WITHOUT_RIGHTS, "train", "--model.hf-assets-path", str(assets)]
    command += ["--data.source", str(folder / "data.txt"), "--data.cache-folder", str(folder / "cache")]
    command += ["--job.dump-folder", str(folder / "run"), "--training.seq-len", "32", "--training.steps", "1"]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = os.environ | rank | {"COLUMNS": "2000", "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "none")}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert words in ended.stderr
    assert str(folder / ("data.txt" if hidden == "data" else "run")) in ended.stderr


def test_no_duration_is_of_a_clock_that_can_jump() -> None:
    """The time of day is a stamp: of failures, for people, of what was measured, of a new folder's name."""
    root = Path(crossdock.__file__).parent
    stamps = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "datetime.now"):
                stamps.add(path.relative_to(root).as_posix())
    known = {"cli/main.py", "comm/watchdog.py", "tools/report/events.py", "tools/tune/tuning.py", "train/watching.py"}
    assert stamps == known


def test_a_clock_that_goes_back_makes_no_run_write_into_another_ones_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, [])
    folders = []
    for second in (10, 9, 10, 9, 10):

        class Clock:
            @staticmethod
            def now(second: int = second) -> Any:
                return datetime(2026, 11, 21, 10, 16, second)

        with monkeypatch.context() as patched:
            patched.setattr(sys.modules["crossdock.cli.main"], "datetime", Clock)
            made = sys.modules["crossdock.cli.main"]._with_run_folder(config, None, first=True)  # type: ignore[attr-defined]
        folders.append(made.job.dump_folder)
    assert len(set(folders)) == 5


def test_settings_of_an_earlier_version_say_what_they_are_called_now(train: Train, tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text("# Written by crossdock 0.0.9\n\n[training]\nmax_skipped_steps = 3\n")
    environment = os.environ | {"COLUMNS": "2000"}
    for arguments in (["config", str(tmp_path / "old.toml")], ["config", "--training.max-skipped-steps", "3"]):
        command = [sys.executable, "-m", "crossdock", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert ended.returncode == 2
        assert "training.max_skipped_steps" in ended.stderr
        assert "is called fault_tolerance.max_skipped_steps now" in ended.stderr
        assert ("crossdock 0.0.9 has written it, this is" in ended.stderr) is ("old.toml" in arguments[-1])


def test_a_run_of_another_version_says_so(train: Train, tmp_path: Path) -> None:
    assert train("--training.steps", 1)[0] == 0
    path = tmp_path / "run" / "config.toml"
    first = f"# Written by crossdock {crossdock.__version__}\n"
    assert first in path.read_text()
    by_another = path.read_text().replace(first, "# Written by crossdock 99.0\n")
    path.write_text(re.sub("(what follows: ).*", r"\1none", by_another))
    code, said = train("--training.steps", 2)
    assert code == 0
    assert f"crossdock 99.0 has written it, this is {crossdock.__version__}" in said
    assert first in path.read_text()
