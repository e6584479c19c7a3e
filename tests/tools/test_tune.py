"""`crossdock tune` on real ranks: it writes a file, and training takes from it what it is for."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from rich.console import Console

from crossdock.config import load_config
from crossdock.config.tuned import TunedEntry, read_tuned
from crossdock.dispatch import free_deepep_buffers
from crossdock.kernels import KERNELS, Tiles
from crossdock.parallel import ParallelDims
from crossdock.tools.tune import TuneOptions, tune
from crossdock.tools.tune.dimensions import kernel_tiles
from crossdock.tools.tune.layer import MeasuredLayer
from tests.blocks import commands_of
from tests.dispatch.deepep_double import Double
from tests.ranks import RankPool
from tests.tiny import run_trainer, speeches, write_assets

ROOT = Path(__file__).parents[2]
EP2 = ["--parallelism.expert-parallel-degree", "2"]
# As long as a busy machine may need.
SECONDS = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_assets(folder / "assets")
    return folder


def settings(folder: Path, *overrides: str) -> list[str]:
    """Of a tiny model, as `run_trainer` has them."""
    return [
        *("--model.hf-assets-path", str(folder / "assets"), "--training.seq-len", "32"),
        *("--data.source", str(speeches(folder / "assets")), "--data.cache-folder", str(folder / "cache")),
        *overrides,
    ]


def start_tune(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`crossdock tune` on two ranks, in a process of its own."""
    taken_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in taken_out}
    environment |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "XDG_CACHE_HOME": str(folder / "xdg")}
    command = [sys.executable, "-m", "crossdock", "tune", *settings(folder, *EP2), "--nproc", "2", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def tuned(folder: Path) -> tuple[str, TunedEntry]:
    """What `crossdock tune` said and wrote, on two ranks."""
    process = start_tune(folder, "--seconds", "9", "--rounds", "3")
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    (entry,) = read_tuned(folder / "xdg/crossdock/tuned.json")
    return output, entry


def chosen(folder: Path, entry: TunedEntry, name: str, **values: Any) -> Path:
    """The file of `tuned`, with other values in the place of what won on this machine."""
    document = json.loads((folder / "xdg/crossdock/tuned.json").read_text())
    measured = document["entries"][0]["settings"]
    for each in measured.values():
        each["chosen"] = each["default"]
    for setting, value in values.items():
        if setting in document["entries"][0]["key"]:
            document["entries"][0]["key"][setting] = value
        else:
            measured[setting] = {"default": None, "chosen": value}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document))
    return path


def test_two_ranks_measure_what_is_open_and_write_it(tuned: tuple[str, TunedEntry], folder: Path) -> None:
    output, entry = tuned
    measured = {"experts", "overlap_chunks", "wire_dtype"}
    assert set(entry.settings) - {"threads"} <= measured
    assert "overlap_chunks" in entry.settings
    assert measured == set(re.findall(r"^(\w+): (?!skipped)", output, re.MULTILINE)) & measured
    assert output.count("skipped, deep_ep is not installed") == 3
    assert f"written: {folder / 'xdg/crossdock/tuned.json'}" in output
    assert output.count("tuning qwen3") == 1, "one rank speaks"
    key = entry.key
    assert (key.hidden_size, key.intermediate_size, key.num_experts, key.top_k) == (32, 16, 8, 2)
    assert (key.tokens_per_rank, key.ep, key.ranks_per_machine, key.dtype) == (8 * 32, 2, 2, "float32")
    assert key.torch == torch.__version__
    for each in entry.settings.values():
        assert each["chosen"] in [candidate["value"] for candidate in each["candidates"]]
        assert all(second > 0 for candidate in each["candidates"] for second in candidate["seconds"])
    assert entry.choices.get("wire_dtype", "same") == "same", "not without --allow-lossy-wire"


def _train(folder: str, run: str, tuned: str, cache: str, overrides: list[str]) -> tuple[list[float], list[str]]:
    """The losses of a short run on this rank's group, and the package's notes."""
    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())
    logger = logging.getLogger("crossdock")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": cache}):
            steps = ["--training.steps", "5", "--training.tuned", tuned, *EP2, *overrides]
            result = run_trainer(f"{folder}/assets", f"{folder}/{run}", f"{folder}/cache", steps)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return [line["loss"] for line in result["metrics"]], notes


@pytest.fixture
def train(ranks: RankPool, folder: Path, tmp_path: Path) -> Callable[..., tuple[list[float], list[str]]]:
    def call(tuned: str | Path, *overrides: str, cache: Path = tmp_path) -> tuple[list[float], list[str]]:
        run = os.path.relpath(tmp_path / "run", folder)
        first, second = ranks.run(2, _train, str(folder), run, str(tuned), str(cache), list(overrides))
        assert first[0] == second[0]
        assert [note for note in first[1] if "tuned" in note] == [note for note in second[1] if "tuned" in note]
        return first

    return call


@pytest.fixture(scope="module")
def plain(ranks: RankPool, folder: Path) -> list[float]:
    """The losses of the run without anything tuned."""
    return ranks.run(2, _train, str(folder), "plain", "off", str(folder), [])[0][0]


def test_training_takes_what_won_and_says_so_with_the_same_numbers(
    tuned: tuple[str, TunedEntry], train: Any, plain: list[float], folder: Path, tmp_path: Path
) -> None:
    path = chosen(folder, tuned[1], "taken", experts="grouped_mm", overlap_chunks=2)
    losses, notes = train(path)
    assert f"tuned: experts = grouped_mm, overlap_chunks = 2, from {path} (measured {tuned[1].date})" in notes
    assert any(note.startswith("dispatcher: alltoall, 2 chunks") for note in notes)
    assert losses == pytest.approx(plain, rel=1e-5)
    saved = (tmp_path / "run/config.toml").read_text()
    assert "overlap_chunks = 0" in saved, "the run's settings stay open"


def test_training_takes_tiles_where_their_kernels_compute(
    tuned: tuple[str, TunedEntry], train: Any, plain: list[float], folder: Path, tmp_path: Path
) -> None:
    """In Triton's interpreter."""
    tiles = {"kernel_tiles.up.64.256": [16, 32, 16, 4, 2, 0], "kernel_tiles.down_grad.256": [32, 16, 16, 4, 2, 0]}
    one_step = ["--training.steps", "1", "--training.local-batch-size", "8"]
    path = chosen(folder, tuned[1], "tiles", experts="triton", **tiles)
    losses, notes = train(path, *one_step)
    assert f"tuned: experts = triton, tiles of up, down_grad, from {path} (measured {tuned[1].date})" in notes
    assert losses == pytest.approx(plain[:1], rel=1e-5)
    losses, notes = train(path, *one_step, "--moe.experts", "cpu", "--job.dump-folder", str(tmp_path / "second"))
    assert any(note.startswith("tuned: nothing taken") for note in notes)


def _tiles(folder: str) -> tuple[list[str], list[Any]]:
    """What is swept of the kernels' tiles, and tiles that the experts have with some of them put in force."""
    overrides = ("--training.local-batch-size", "1", "--training.dtype", "bfloat16", "--training.tuned", "off")
    config = load_config(None, settings(Path(folder), *overrides))
    measured = MeasuredLayer(config, ParallelDims(1), torch.device("cpu"))
    swept = kernel_tiles(measured.layer, tokens_per_rank=1000)
    seen: list[Any] = []
    for dimension in swept[:2]:
        small = Tiles(16, 16, 16, 4, 2)
        measured.apply({**dimension.given, dimension.name: small})
        assert measured.run(dimension.part, 1) > 0
        seen += [measured.layer.experts.backend, dict(measured.layer.experts.kernel_tiles)]
    measured.apply({})
    return [dimension.name for dimension in swept], [*seen, measured.layer.experts.kernel_tiles]


def test_tiles_of_every_kernel_are_swept_for_the_rows_that_an_expert_has(ranks: RankPool, folder: Path) -> None:
    ((names, seen),) = ranks.run(1, _tiles, str(folder))
    # 1000 tokens, 2 of 8 experts each: 250 rows, beside the boundary of 256.
    assert names == [f"kernel_tiles.{kernel}.256.1024" for kernel in KERNELS]
    small = (16, 16, 16, 4, 2, 0)
    of_up, of_down = ({(kernel, 256): small, (kernel, 1024): small} for kernel in ("up", "down"))
    assert seen == ["triton", of_up, "triton", of_down, None]


def test_what_the_run_sets_stays_as_it_is_set(tuned: tuple[str, TunedEntry], train: Any, folder: Path) -> None:
    path = chosen(folder, tuned[1], "set", experts="grouped_mm", overlap_chunks=2)
    _, notes = train(path, "--moe.overlap-chunks", "4")
    assert f"tuned: experts = grouped_mm, from {path} (measured {tuned[1].date})" in notes
    assert any(note.startswith("dispatcher: alltoall, 4 chunks") for note in notes)


@pytest.mark.parametrize("name", ["tokens_per_rank", "torch", "device"])
def test_what_was_measured_for_something_else_is_not_taken(
    name: str, tuned: tuple[str, TunedEntry], train: Any, folder: Path
) -> None:
    other = {"tokens_per_rank": 512, "torch": "2.0.0", "device": "Another"}[name]
    path = chosen(folder, tuned[1], f"other_{name}", overlap_chunks=2, **{name: other})
    _, notes = train(path)
    (note,) = [note for note in notes if "tuned" in note]
    assert note.startswith(f"tuned: nothing for this run in {path}; the nearest entry has {name} {other!r}, here ")
    assert any(note.startswith("dispatcher: alltoall, 1 chunk") for note in notes)


def test_a_file_in_the_cache_folder_is_found_and_a_damaged_one_warned_of(
    tuned: tuple[str, TunedEntry], train: Any, plain: list[float], folder: Path, tmp_path: Path
) -> None:
    losses, notes = train("auto")
    assert losses == plain
    assert not any("tuned" in note for note in notes), "without a file, as ever"
    (tmp_path / "crossdock").mkdir()
    path = chosen(folder, tuned[1], "found", overlap_chunks=2).rename(tmp_path / "crossdock/tuned.json")
    (note,) = [note for note in train("auto", "--job.dump-folder", str(tmp_path / "second"))[1] if "tuned" in note]
    assert note.startswith(f"tuned: overlap_chunks = 2, from {path}")
    path.write_text(path.read_text()[:-20])
    losses, notes = train("auto", "--job.dump-folder", str(tmp_path / "third"))
    (note,) = [note for note in notes if "tuned" in note]
    assert f"{path} is damaged" in note
    assert losses == plain


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("is_open", [True, False])
def test_threads_are_taken_where_the_launcher_chose_them(
    is_open: bool,
    folder: Path,
    tmp_path: Path,
    only_rank: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if is_open:
        monkeypatch.setenv("CROSSDOCK_CHOSEN_THREADS", "1")
    path = tmp_path / "tuned.json"
    tune = settings(folder, "--seconds", "3", "--rounds", "3", "--output", str(path))
    assert only_rank("tune", *tune) == 0
    assert ("threads: skipped, OMP_NUM_THREADS is set" in capsys.readouterr().out) is not is_open
    document = json.loads(path.read_text())
    document["entries"][0]["settings"] = {"threads": {"default": 1, "chosen": 2}}
    path.write_text(json.dumps(document))
    run = settings(
        folder, "--training.steps", "1", "--training.tuned", str(path), "--job.dump-folder", str(tmp_path / "run")
    )
    assert only_rank("train", *run) == 0
    assert ("tuned: threads = 2, from" in capsys.readouterr().out) is is_open
    assert torch.get_num_threads() == (2 if is_open else 1)


def test_ctrl_c_leaves_what_is_finished(folder: Path) -> None:
    path = folder / "interrupted.json"
    process = start_tune(folder, "--seconds", "16", "--rounds", "1000", "--output", str(path))
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(r"\w+: (?!skipped)", line):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=SECONDS)
    output = "".join(lines) + rest
    assert process.returncode == 0, output
    (entry,) = read_tuned(path)
    assert 1 <= len(entry.settings) <= 3
    assert "wire_dtype: skipped, no time was left" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "overrides",
    [
        ["--training.dtype", "bfloat16"],
        ["--training.dtype", "float64"],
        ["--moe.static-shapes"],
        ["--model.name", "generic"],
        ["--moe.sequence-aux-loss-coeff", "0.01", "--moe.capacity-factor", "1.25"],
    ],
    ids=lambda overrides: overrides[-1].strip("-"),
)
def test_every_kind_of_layer_is_measured(
    overrides: list[str], folder: Path, tmp_path: Path, only_rank: Callable[..., int], capsys: Any
) -> None:
    path = tmp_path / "tuned.json"
    tune = settings(folder, *overrides, "--seconds", "4", "--rounds", "3", "--output", str(path))
    assert only_rank("tune", *tune) == 0
    output = capsys.readouterr().out
    assert "overlap_chunks: skipped, nothing travels" in output
    if "--moe.static-shapes" in overrides:
        assert "experts: skipped, no other backend than grouped_mm" in output
    assert "fails" not in output


def _tune_deepep(folder: str, api: str) -> tuple[dict[str, Any], str, set[int], set[tuple[str, int]], int]:
    """What was measured with the double of DeepEP, what was said, what the library was asked for, and its buffers."""
    config = load_config(
        None,
        [
            *("--model.hf-assets-path", f"{folder}/wide", "--training.seq-len", "32", *EP2),
            *("--training.dtype", "bfloat16", "--moe.dispatcher", "deepep", "--moe.deepep-api", api),
        ],
    )
    double, console = Double(), Console(file=io.StringIO(), width=200)
    sys.modules["deep_ep"] = cast(Any, double)
    try:
        dims = ParallelDims.from_config(config.parallelism, 2)
        options = TuneOptions(Path(folder, f"{api}.json"), seconds=60, rounds=3)
        entry = tune(config, dims, torch.device("cpu"), options, console=console)
        free_deepep_buffers()
    finally:
        del sys.modules["deep_ep"]
    said = cast(io.StringIO, console.file).getvalue()
    return dict(entry.settings), said, double.num_sms, double.chunks, double.outstanding


@pytest.mark.parametrize("api", ["elastic", "buffer"])
def test_what_deep_ep_leaves_open_is_measured(api: str, ranks: RankPool, folder: Path) -> None:
    write_assets(folder / "wide", hidden_size=256)
    first, second = ranks.run(2, _tune_deepep, str(folder), api)
    assert first[0] == second[0]
    settings, said, num_sms, chunks, outstanding = first
    assert {8, 12, 16, 20, 24, 32, 48} <= num_sms
    assert outstanding == 0
    assert "wire_dtype: skipped, deepep has none" in said
    if api == "elastic":
        assert said.count("skipped, ElasticBuffer has no chunks") == 2
        assert set(settings) == {"experts", "overlap_chunks", "deepep_num_sms"}
    else:
        assert {("dispatch", size) for size in (4, 6, 8, 12, 16, 24, 32)} <= chunks
        assert {("combine", size) for size in (1, 2, 3, 4, 5, 6)} <= chunks
        assert {"deepep_dispatch_chunk", "deepep_combine_chunk"} <= set(settings)


COMMANDS = [command.removeprefix("crossdock ") for command in commands_of("docs/tune.md")]


def test_the_documents_commands_work(
    folder: Path, tmp_path: Path, only_rank: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert len(COMMANDS) >= 6
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        name, *arguments = shlex.split(command)
        # Smaller, not other, work.
        smaller = ["--model.flavor=", *settings(folder, "--training.steps", "1")]
        smaller += ["--seconds", "3", "--rounds", "3"] if name == "tune" else []
        assert only_rank(name, *arguments, *smaller) == 0, command
        said = "written: " if name == "tune" else "tuned: "  # found, whatever has won
        assert said in capsys.readouterr().out, command
