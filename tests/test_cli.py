"""The command line: a mistake gives one message and exit code 2 before any rank is started."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import crossdock
import crossdock.train.launch as launch
from crossdock.cli import main
from crossdock.config import Config, load_config, to_toml, write_run_settings
from crossdock.train.stopping import StopSignal
from tests.tiny import by_hand, write_assets


@pytest.fixture(autouse=True)
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], launch.Machines]]:
    """Run in an empty folder, on a machine without GPUs; the launches that would have started ranks."""
    started: list[tuple[list[str], launch.Machines]] = []

    def start_ranks(arguments: list[str], machines: launch.Machines, *_: object) -> int:
        started.append((arguments, machines))
        return 0

    monkeypatch.setattr(launch, "start_ranks", start_ranks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("COLUMNS", "1000")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return started


def call(arguments: str) -> int:
    """The exit code of `crossdock ARGUMENTS`."""
    with pytest.raises(SystemExit) as exited:
        main(shlex.split(arguments))
    assert isinstance(exited.value.code, int)
    return exited.value.code


def panels(text: str) -> int:
    return sum(line.startswith(("╭", "+-")) for line in text.splitlines())


# What is typed, and words that the message must hold: field, value, what would be valid.
MISTAKES = [
    ("trian", "command", "'trian'", "train, config, generate, eval, export, convert, report, tune"),
    ("train nofile.toml", "config file", "'nofile.toml'", "No such file"),
    ("train folder", "config file", "'folder'", "directory"),
    ("train binary.toml", "config file", "'binary.toml'", "valid TOML"),
    ("train syntax.toml", "config file", "'syntax.toml'", "line 2"),
    ("train twice.toml", "config file", "'twice.toml'", "overwrite"),
    ("train dashes.toml", "training.seq_len", "6", "twice"),
    ("train key.toml", "training.stepz", "5", "training.steps"),
    ("train section.toml", "trainin", "did you mean training?", "section.toml"),
    ("train bare_key.toml", "steps", "3", "training.steps"),
    ("train string.toml", "training.steps", "'3'", "a whole number"),
    ("train float.toml", "training.steps", "3.5", "a whole number"),
    ("train bool_for_float.toml", "optimizer.lr", "True", "a number"),
    ("train bool.toml", "moe.expert_bias", "'true'", "true or false"),
    ("train choice.toml", "training.dtype", "'float16'", "float32, bfloat16, float64"),
    ("train table.toml", "training", "3", "[training]"),
    ("train --training.stepz 5", "training.stepz", "'5'", "training.steps"),
    ("train --steps=5", "steps", "'5'", "training.steps"),
    ("train --training 5", "training", "'5'", "section"),
    ("train --training.steps", "training.steps", "no value", "a whole number"),
    ("train --training.steps --training.seed 3", "training.steps", "no value", "a whole number"),
    ("train --training.steps many", "training.steps", "'many'", "a whole number"),
    ("train --training.steps 1.5", "training.steps", "'1.5'", "a whole number"),
    ("train --training.steps -5", "training.steps", "-5", "positive"),
    ("train --metrics.load-interval -1", "metrics.load_interval", "-1", "0 or more"),
    ("train --optimizer.lr fast", "optimizer.lr", "'fast'", "a number"),
    ("train --optimizer.lr nan", "optimizer.lr", "nan", "finite"),
    ("train --optimizer.lr=-inf", "optimizer.lr", "-inf", "finite"),
    ("train --lr-scheduler.decay-ratio none", "lr_scheduler.decay_ratio", "'none'", "a number or None"),
    ("train list.toml", "metrics.trackers", "'mlflow'", "tensorboard, wandb, trackio"),
    ("train --metrics.trackers wandb,mlflow", "metrics.trackers", "'mlflow'", "tensorboard, wandb, trackio"),
    ("train --metrics.trackers", "metrics.trackers", "no value", "a list"),
    ("train --training.dtype float16", "training.dtype", "'float16'", "float32, bfloat16, float64"),
    ("train --moe.expert-bias true", "moe.expert_bias", "'true'", "--moe.no-expert-bias"),
    ("train --training.steps 5 key.toml", "argument", "'key.toml'", "--section.key value"),
    ("train -x", "argument", "'-x'", "--section.key value"),
    ("train --model.name abacus", "model.name", "'abacus'", "qwen3"),
    ("train --model.flavor debugg", "model.flavor", "'debugg'", "30B-A3B"),
    ("train --model.flavor debug-deepep", "model.flavor", "'debug-deepep'", "alltoall"),
    ("train --moe.dispatcher deepep", "moe.dispatcher", "'deepep'", "github.com/deepseek-ai/DeepEP"),
    ("train --moe.deepep-num-sms 7", "moe.deepep_num_sms", "7", "even"),
    ("train --model.hf-assets-path nowhere", "model.hf_assets_path", "nowhere'", "existing folder"),
    ("train --model.hf-assets-path folder", "model.hf_assets_path", "folder'", "config.json"),
    ("train --model.hf-assets-path assets", "training.seq_len", "256", "128 positions"),
    ("train --training.seq-len 5000", "training.seq_len", "5000", "4096"),
    (
        "train --nproc 4 --parallelism.expert-parallel-degree 4 --moe.dispatcher hierarchical --moe.ranks-per-node 3",
        "moe.ranks_per_node",
        "3",
        "must divide",
    ),
    ("train --moe.ranks-per-node -1", "moe.ranks_per_node", "-1", "0 or more"),
    (
        "train --moe.debug-force-zipf 1 --training.debug-moe-force-load-balance",
        "moe.debug_force_zipf",
        "1.0",
        "does not",
    ),
    ("train --moe.wire-dtype fp4", "moe.wire_dtype", "'fp4'", "fp8"),
    ("train --moe.wire-directions back", "moe.wire_directions", "'back'", "tokens, both"),
    ("train --moe.static-shapes --moe.dispatcher hierarchical", "moe.static_shapes", "True", "allgather or alltoall"),
    ("train --moe.static-shapes --moe.experts cpu", "moe.static_shapes", "True", "auto or grouped_mm or triton"),
    ("train --moe.static-shapes --training.dtype float64", "moe.static_shapes", "True", "float64"),
    ("train --moe.experts abacus", "moe.experts", "'abacus'", "cpu"),
    ("train --nproc 2 --training.global-batch-size 17", "training.global_batch_size", "17", "multiple of 16"),
    ("train --nproc 2 --parallelism.expert-parallel-degree 3", "expert_parallel_degree", "3", "1, 2"),
    ("train --nproc 16 --parallelism.expert-parallel-degree 16", "expert_parallel_degree", "16", "at most 8"),
    (
        "train --nproc 3 --parallelism.tensor-parallel-degree 3",
        "parallelism.tensor_parallel_degree",
        "3",
        "nearest that does is 2",
    ),
    ("train --job.dump-folder file", "job.dump_folder", "file'", "folder"),
    ("train --job.dump-folder foreign", "job.dump_folder", "foreign'", "of a run"),
    ("train --job.dump-folder run --training.seed 6", "training.seed", "6", "5"),
    ("train --job.dump-folder corrupt", "config file", "config.toml'", "valid TOML"),
    ("train --job.dump-folder " + "long" * 100, "job.dump_folder", "longlong", "too long"),
    ("train --data.cache-folder file/cache", "data.cache_folder", "file/cache'", "folder"),
    ("train --nnodes 2", "--master-addr", "None", "machine 0"),
    ("train --nproc 0", "--nproc", "0", "1 or more"),
    ("train --nproc some", "--nproc", "'some'", "int"),
    ("train --nproc", "--nproc", "one argument", ""),
    ("train --nprocs 2", "--nprocs", "--nproc?", ""),
    ("train --node-rank 3", "--node-rank", "3", "0"),
    ("train --training.tuned nowhere.json", "training.tuned", "nowhere.json'", "No such file"),
    ("train --training.tuned binary.toml", "training.tuned", "binary.toml'", "damaged"),
    ("tune --training.stepz 5", "training.stepz", "'5'", "training.steps"),
    ("tune --seconds 0", "--seconds", "positive", ""),
    ("tune --seconds nan", "--seconds", "positive", ""),
    ("tune --rounds 2", "--rounds", "3 or more", ""),
    ("tune --lora.rank 4", "lora.rank", "4", "must be 0"),
    ("tune --output syntax.toml", "--output", "syntax.toml'", "move it away"),
    ("tune --output file/below/tuned.json", "--output", "file/below'", "folder"),
    ("tune --nproc 2 --parallelism.expert-parallel-degree 3", "expert_parallel_degree", "3", "1, 2"),
    ("config --training.stepz 5", "training.stepz", "'5'", "training.steps"),
    ("config --model.flavor debugg", "model.flavor", "'debugg'", "30B-A3B"),
    ("config --job.dump-folder foreign", "job.dump_folder", "foreign'", "of a run"),
    ("config --nproc 2 --parallelism.expert-parallel-degree 3", "expert_parallel_degree", "3", "1, 2"),
]


@pytest.fixture
def mistaken_files(tmp_path: Path) -> None:
    texts = {
        "syntax.toml": "[training]\nsteps =\n",
        "twice.toml": "[training]\nsteps = 3\nsteps = 4\n",
        "dashes.toml": "[training]\nseq-len = 5\nseq_len = 6\n",
        "key.toml": "[training]\nstepz = 5\n",
        "section.toml": "[trainin]\nsteps = 5\n",
        "bare_key.toml": "steps = 3\n",
        "string.toml": "[training]\nsteps = '3'\n",
        "float.toml": "[training]\nsteps = 3.5\n",
        "bool_for_float.toml": "[optimizer]\nlr = true\n",
        "bool.toml": "[moe]\nexpert_bias = 'true'\n",
        "choice.toml": "[training]\ndtype = 'float16'\n",
        "table.toml": "training = 3\n",
        "list.toml": "[metrics]\ntrackers = ['wandb', 'mlflow']\n",
        "file": "",
        "foreign/thesis.tex": "",
        "corrupt/config.toml": by_hand("[training\n"),
        "run/config.toml": by_hand("[training]\nseed = 5\n"),
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.toml").write_bytes(bytes(range(128, 256)))
    (tmp_path / "folder").mkdir()
    write_assets(tmp_path / "assets")


@pytest.mark.usefixtures("mistaken_files")
@pytest.mark.parametrize(
    ("arguments", "field", "value", "valid"), MISTAKES, ids=[mistake[0][:60] for mistake in MISTAKES]
)
def test_a_mistake_gives_one_message_that_names_the_field(
    arguments: str,
    field: str,
    value: str,
    valid: str,
    launches: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert call(arguments) == 2
    output, message = capsys.readouterr()
    assert output == ""
    assert panels(message) == 1
    assert message.startswith(("╭", "+-"))
    assert "Traceback" not in message
    for words in (field, value, valid):
        assert words in message
    assert launches == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "crossdock", "train", "--training.stepz", "5"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert panels(ended.stderr) == 1
    assert "Traceback" not in ended.stderr
    assert "did you mean training.steps?" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["train --training.stepz 5", "train --training.seq-len 5000", "train --nproc x"])
def test_of_several_ranks_only_the_first_speaks(
    arguments: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StopSignal, "install", lambda self: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("too late"))
    arguments += f" --job.dump-folder {tmp_path / 'run'}"
    spoken = []
    for rank in ("0", "1"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert call(arguments) == 2
        spoken.append(panels(capsys.readouterr().err))
    assert spoken == [1, 0]


def test_ranks_read_what_was_validated(launches: list[tuple[list[str], launch.Machines]], tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_text("[training]\nsteps = 5\n")
    assert call("train some.toml --nproc 4 --training.seed 3 --parallelism.expert_parallel-degree=4") == 0
    ((arguments, machines),) = launches
    assert machines == launch.Machines(4)
    command, path, *overrides = arguments
    assert (command, path) == ("train", "some.toml")
    config = load_config(Path(path), overrides)
    assert (config.training.steps, config.training.seed, config.parallelism.expert_parallel_degree) == (5, 3, 4)
    folder = Path(config.job.dump_folder)
    assert folder.is_dir()
    assert folder.parent == tmp_path / "runs" / "some"


def test_two_runs_that_start_at_once_have_folders_of_their_own(
    launches: list[tuple[list[str], launch.Machines]],
) -> None:
    for _ in range(3):
        assert call("train") == 0
    assert len({arguments[-1] for arguments, _ in launches}) == 3


def test_the_first_machine_names_the_run_folder(
    launches: list[tuple[list[str], launch.Machines]], tmp_path: Path
) -> None:
    assert call("train --nnodes 2 --node-rank 1 --master-addr host") == 0
    ((arguments, machines),) = launches
    assert machines == launch.Machines(2, 2, 1, "host")
    assert load_config(None, arguments[1:]).job.dump_folder == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_resumed_by_its_folder_alone(
    launches: list[tuple[list[str], launch.Machines]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, ["--training.seed", "5", "--job.dump-folder", "run"])
    (tmp_path / "run").mkdir()
    write_run_settings(config, tmp_path / "run")
    assert call("train --job.dump-folder run") == 0
    ((arguments, _),) = launches
    assert load_config(None, arguments[1:]) == config
    assert call("config --job.dump-folder run") == 0
    assert capsys.readouterr().out == to_toml(config)


def test_an_unwritable_place_for_runs_is_named(
    launches: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").touch()
    assert call("train") == 2
    assert "job.dump_folder" in capsys.readouterr().err
    assert launches == []


@pytest.mark.parametrize(
    ("arguments", "field"),
    [("train --nproc 4", "--nproc"), ("train --training.dtype float64", "training.dtype")],
)
def test_gpus_set_limits(
    arguments: str, field: str, launches: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(arguments) == 0
    launches.clear()
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert call(arguments) == 2
    assert field in capsys.readouterr().err
    assert launches == []


def test_what_config_prints_is_a_config_file_for_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_assets(tmp_path / "assets")
    settings = "--model.hf-assets-path assets --training.seq-len 64 --lr-scheduler.decay-ratio 0.25 --moe.expert-bias"
    assert call(f"config {settings} --optimizer.lr 3e-4") == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.toml").write_text(printed)
    assert load_config(tmp_path / "printed.toml") == load_config(None, [*settings.split(), "--optimizer.lr=0.0003"])
    assert call("config printed.toml") == 0
    assert capsys.readouterr().out == printed


def test_config_checks_the_layout_where_the_ranks_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config --parallelism.expert-parallel-degree 4") == 0
    assert call("config --parallelism.expert-parallel-degree 4 --nproc 2 --nnodes 2 --master-addr host") == 0
    assert call("config --parallelism.expert-parallel-degree 4 --nproc 2") == 2


def test_help_lists_every_setting_with_its_meaning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # In one column.
    assert call("train --help") == 0
    shown = capsys.readouterr().out.replace("│", " ")
    for section in dataclasses.fields(Config):
        for setting in dataclasses.fields(getattr(Config(), section.name)):
            option = f"--{section.name}.{setting.name}".replace("_", "-")
            _, found, after = shown.partition(f" {option}")
            assert found, option
            words = after.split("(default:")[0].split()
            meaning = [word for word in words if not word.startswith(("{", ",", "--")) and not word.isupper()]
            assert len(meaning) >= 2, option


@pytest.mark.parametrize("arguments", ["--help", "-h", "help"])
def test_the_usage_tells_of_every_command(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(arguments) == 0
    usage = capsys.readouterr().out
    assert all(f"crossdock {command}" in usage for command in ("train", "config", "report", "--version"))


def test_without_a_command_the_usage_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("") == 2
    output, message = capsys.readouterr()
    assert output == ""
    assert "crossdock train" in message


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"crossdock {crossdock.__version__}\n"
