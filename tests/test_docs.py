"""The code blocks of README.md and of docs/ do what they say.

Every block is checked: of a command the syntax, and its arguments and settings by the parser and the validation that
run it, for as many ranks as it asks for, or 8; of a program the syntax, and that what it imports of crossdock is there;
of settings that they are valid.

What is not marked `<!-- not run: REASON -->` runs, too, on a tiny model and one rank: less, not other, work. Of
commands with the same options one runs, since the others differ in values alone, which are checked as above. Pages in
`ELSEWHERE` are run by tests of their own.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from crossdock.cli.common import Parser, machine_options, split_path
from crossdock.cli.main import COMMANDS
from crossdock.config import Config, check_settings, load_config, ranks_per_group, validate
from crossdock.tools.plan import read_devices
from tests.blocks import REASONS, ROOT, Block, blocks_of, pages, words_of
from tests.ranks import RankPool
from tests.smaller import smaller
from tests.tiny import run_trainer, write_assets

# What is run, with stand-ins of its own.
ELSEWHERE = {
    ("README.md", "python"): "tests/test_readme.py",
    ("docs/balance.md", "python"): "tests/balance/test_docs.py",
    ("docs/bench.md", "bash"): "tests/tools/test_bench.py",
    ("docs/data.md", "python"): "tests/data/test_docs.py",
    ("docs/finetune.md", "bash"): "tests/test_finetune_docs.py",
    ("docs/finetune.md", "python"): "tests/train/test_lora.py",
    ("docs/layouts.md", "python"): "tests/parallel/test_docs.py",
    ("docs/models.md", "python"): "tests/models/test_generic.py",
    ("docs/moe.md", "python"): "tests/parallel/test_unpacked.py",
    ("docs/report.md", "bash"): "tests/tools/test_report_watch.py",
    ("docs/transformers.md", "python"): "tests/integrations/test_docs.py",
    ("docs/tune.md", "bash"): "tests/tools/test_tune.py",
}
BLOCKS = [block for page in pages() for block in blocks_of(page)]
LANGUAGES = {"bash", "json", "python", "text", "toml", "yaml"}
RUN = "runs/debug/20261121-101622"
TITAN = "torchtitan/step-1000"
# A model of the hub, or one that a page speaks of: the tiny one, under its name.
MODELS = ("MODEL", "Qwen3-30B-A3B", "granite-3.1-1b-a400m-base", "my-moe", "runs/tiny-moe")
DENSE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
RANKS = 8
SECONDS = 240


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block."""
    return [[words[0].removeprefix(".venv/bin/"), *words[1:]] for words in words_of(block.text)]


def runs_here(block: Block) -> bool:
    return not block.reason and (block.page, block.language) not in ELSEWHERE


def _kind(words: list[str]) -> tuple[str, ...]:
    """A command and its options: commands that agree in these differ in values alone."""
    program = words[:2] if words[0] == "crossdock" else words[:1]
    return (*program, *sorted({word.partition("=")[0] for word in words[2:] if word.startswith("--")}))


def _to_run() -> dict[tuple[str, ...], tuple[str, list[str]]]:
    found: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for block in BLOCKS:
        if block.language == "bash" and runs_here(block):
            for words in commands(block):
                found.setdefault(_kind(words), (block.page, words))
    return found


TO_RUN = _to_run()
PROGRAMS = [block for block in BLOCKS if block.language == "python" and runs_here(block)]


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_assets(folder / "assets", max_position_embeddings=4096)
    arguments = (str(folder / "assets"), str(folder / RUN), str(folder / "cache"))
    ranks.run(1, run_trainer, *arguments, ["--training.steps", "1"])
    template = runpy.run_path(str(ROOT / "examples/finetune/make_model.py"))["CHAT_TEMPLATE"]
    for name in ("hf", "hf_assets"):
        (folder / RUN / name / "chat_template.jinja").write_text(template)
    titan = AutoModelForCausalLM.from_pretrained(folder / RUN / "hf").state_dict()
    dcp.save(titan, checkpoint_id=folder / TITAN, no_dist=True)
    Qwen3ForCausalLM(Qwen3Config(**DENSE)).save_pretrained(folder / "Qwen3-1.7B")
    (folder / "speech.txt").write_text("Fellow citizens of the Senate and of the House of Representatives. " * 3)
    (folder / "corpus").mkdir()
    shutil.copy(folder / "speech.txt", folder / "corpus")
    talks = [{"text": "Dear friends. " * 20, "messages": [{"role": "user", "content": "a"}] * 2} for _ in range(40)]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a checkout with a run, models and texts under the names that the pages use."""
    for name in ("speech.txt", "talks.jsonl", "corpus", "torchtitan", "Qwen3-1.7B"):
        (tmp_path / name).symlink_to(folder / name)
    for name in ("configs", "examples", "benchmarks", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(folder / "runs", tmp_path / "runs")
    for name in MODELS:  # the generic adapter takes any family
        (tmp_path / name).symlink_to(folder / RUN / "hf")
    (tmp_path / "RUN").symlink_to(folder / RUN)
    (tmp_path / "CONFIG.toml").symlink_to(ROOT / "configs/debug.toml")
    (tmp_path / "expert_load.bin").symlink_to(folder / RUN / "expert_load.bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    return tmp_path


class _Parsed(Exception):
    def __init__(self, known: argparse.Namespace, rest: list[str]) -> None:
        self.known, self.rest = known, rest


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """`parse(command, arguments)`: as far as `crossdock COMMAND ARGUMENTS` comes before any work."""
    known = argparse.ArgumentParser.parse_known_args

    def some(self: Parser, *arguments: Any) -> Any:
        if not self.add_help:  # what all commands share
            return known(self, *arguments)
        raise _Parsed(*known(self, *arguments))

    def whole(self: Parser, *arguments: Any) -> None:
        found, rest = known(self, *arguments)
        assert not rest, f"unknown: {rest}"
        raise _Parsed(found, [])

    def call(name: str, arguments: list[str]) -> None:
        options, rest = machine_options(arguments)
        if name in ("train", "config"):
            words = [word for word in rest if word not in ("--profile", "--help")]
        else:
            with monkeypatch.context() as patched:
                patched.setattr(Parser, "parse_known_args", some)
                patched.setattr(Parser, "parse_args", whole)
                with pytest.raises((_Parsed, SystemExit)) as ended:
                    COMMANDS[name](rest, options)
            if isinstance(ended.value, SystemExit):
                assert "--help" in rest, "refused"
                return
            words = ended.value.rest
            if name == "plan":
                _check_settings(words, ended.value.known.gpus, 1)
                return
            if name != "tune":
                assert not words
                return
        if "--training.tuned" in words:  # a file that the command before it writes
            words[words.index("--training.tuned") + 1] = "off"
        _check_settings(words, (options.nproc or RANKS), options.nnodes[1])

    return call


def _check_settings(words: list[str], nproc: int, nnodes: int) -> None:
    config = _with_a_dispatcher(load_config(*split_path(words)))
    check_settings(config)
    validate(config, ranks_per_group(config, nproc, nnodes), nproc)


def _with_a_dispatcher(config: Config) -> Config:
    """`deepep` is refused without its library."""
    model = replace(config.model, flavor=config.model.flavor.removesuffix("-deepep"))
    moe = replace(config.moe, dispatcher="alltoall") if config.moe.dispatcher == "deepep" else config.moe
    return replace(config, model=model, moe=moe)


def _settings_of_script(words: list[str], number: int) -> None:
    """Those of `NGPU=4 ./run_train.sh ...` and of `sbatch examples/launch/slurm.sbatch CONFIG.toml ...`."""
    variables = dict(word.split("=", 1) for word in words[:number] if "=" in word and not word.startswith("-"))
    assert set(variables) <= {"CONFIG_FILE", "NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    config = [variables.get("CONFIG_FILE", "configs/debug.toml")] if words[number].endswith("run_train.sh") else []
    settings = [word.replace(RUN, "new") for word in words[number + 1 :]]  # which has settings of its own
    _check_settings([*config, *settings], int(variables.get("NGPU", RANKS)), int(variables.get("NNODES", 1)))


@pytest.mark.parametrize("page", pages())
def test_blocks_are_of_a_language_and_what_does_not_run_says_why(page: str) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block.place
        assert not block.reason or block.reason.startswith(REASONS), block.place
        if block.reason.startswith("part of a program"):
            named = re.findall(r"\w[\w/-]*\.\w+", block.reason)
            assert named, block.place
            assert all((ROOT / name).is_file() for name in named), block.place
        if block.language == "text":
            assert not re.match(r"crossdock [a-z]+( |$)|python |pip |torchrun |\./run", block.text), block.place
    text = (ROOT / page).read_text()
    outside = re.sub(r"^(```+).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^ {4,}(?:\.venv/bin/)?crossdock .*", outside, re.MULTILINE), "fenced, with a language"
    assert text.count("<!-- not run:") == sum(bool(block.reason) for block in blocks_of(page)), "right before a block"


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "bash"}))
def test_commands_are_valid(here: Path, parse: Callable[[str, list[str]], None], page: str) -> None:
    for block in blocks_of(page, "bash"):
        subprocess.run(["bash", "-n", "-c", block.text], check=True)
        for words in commands(block):
            _stand_ins(here, words)
            words = [word.replace("/shared/", f"{here}/shared/") for word in _whole(page, words)]
            script = [number for number, word in enumerate(words) if word.endswith(("run_train.sh", ".sbatch"))]
            named = [number for number, word in enumerate(words) if word == "crossdock"]
            if script:
                _settings_of_script(words, script[0])
            elif named and not words[0].startswith("pip"):
                name, *arguments = words[named[0] + 1 :]
                if name in ("--help", "--version"):
                    continue
                assert name in COMMANDS, block.place
                try:
                    parse(name, arguments)
                except (SystemExit, ValueError) as error:
                    raise AssertionError(f"{block.place}: {shlex.join(words)}: {error}") from error


def _stand_ins(here: Path, words: list[str]) -> None:
    """The tiny model under the name of the one that a command starts from."""
    for option, value in pairwise(words):
        if option in ("--model.hf-assets-path", "--checkpoint.initial-load-path") and not (here / value).exists():
            (here / value).parent.mkdir(parents=True, exist_ok=True)
            (here / value).symlink_to((here / "MODEL").resolve())


def _stand_in_runs(here: Path, words: list[str]) -> None:
    """The tiny model's run under the names of those that a command reads."""
    read = words[2:3] if words[1] in ("generate", "eval", "export") else words[2:] if words[1] == "report" else []
    for run in read:
        if run.startswith("runs/") and not run.endswith(".html") and not (here / run).exists():
            shutil.copytree((here / RUN).resolve(), here / run, symlinks=True)


def _whole(page: str, words: list[str]) -> list[str]:
    """A command that goes on with a run, with the settings of the command before it that made the run."""
    if words[:2] != ["crossdock", "train"] or "--job.dump-folder" not in words or not words[2].startswith("-"):
        return words
    run = words[words.index("--job.dump-folder") + 1]
    for block in blocks_of(page, "bash"):
        for made in commands(block):
            if made[:2] == words[:2] and not made[2].startswith("-") and run in made:
                return [*made, *words[2:]]
    return words


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_programs_compile_and_import_what_is_there(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    for block in blocks_of(page, "python"):
        # What is part of a function may return.
        text = f"def part():\n{indent(block.text, '    ')}" if block.reason else block.text
        compile(text, block.place, "exec")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("crossdock"):
                module = importlib.import_module(node.module or "")
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{block.place}: {node.module} has no {missing}"
            elif isinstance(node, ast.Import):
                for name in node.names:
                    if name.name.startswith("crossdock"):
                        importlib.import_module(name.name)


@pytest.mark.parametrize("page", sorted({b.page for b in BLOCKS if b.language in ("toml", "yaml", "json")}))
def test_settings_are_valid(here: Path, page: str) -> None:
    for block in blocks_of(page):
        if block.language == "yaml":
            list(yaml.safe_load_all(block.text))
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            (here / "some.toml").write_text(block.text)
            tables = tomllib.loads(block.text)
            if set(tables) & set(Config.__dataclass_fields__):
                paths = tables.get("model", {}).get("hf_assets_path")
                _stand_ins(here, ["--model.hf-assets-path", paths] if paths else [])
                check_settings(_with_a_dispatcher(load_config(here / "some.toml")))
            else:
                assert set(tables) <= set(read_devices(here / "some.toml")), block.place


def test_what_runs_elsewhere_is_read_there() -> None:
    for (page, language), test in ELSEWHERE.items():
        assert blocks_of(page, language)
        assert Path(page).name in (ROOT / test).read_text()


def test_commands_of_every_kind_run() -> None:
    run = {words[1] for _, words in TO_RUN.values() if words[0] == "crossdock"}
    assert run >= {"train", "generate", "eval", "export", "convert", "report", "doctor", "plan"}


@pytest.mark.parametrize(
    ("page", "words"), TO_RUN.values(), ids=lambda value: value if isinstance(value, str) else shlex.join(value)
)
def test_commands_work(here: Path, folder: Path, only_rank: Callable[..., int], page: str, words: list[str]) -> None:
    _stand_ins(here, words)
    if words[0] != "crossdock":
        _run_program(here, words)
        return
    _stand_in_runs(here, words)
    whole = _whole(page, words)
    try:
        if whole != words:
            assert only_rank(*smaller(whole[: len(whole) - len(words) + 2], folder)) == 0
        arguments = smaller(words, folder)
        assert only_rank(*arguments) == 0
    finally:
        if dist.is_initialized():  # by a command that has failed
            dist.destroy_process_group()
    if arguments[0] == "export" or (arguments[0] == "convert" and arguments[2] != "converted"):
        AutoModelForCausalLM.from_pretrained(here / arguments[2])


def _run_program(here: Path, words: list[str]) -> None:
    """`python FILE`, `torchrun FILE`, or a line of shell."""
    for word in words:
        if word in MODELS:  # which it writes
            (here / word).unlink()
    start = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    }.get(words[0])
    command = [*start, *words[1:]] if start else ["bash", "-c", " ".join(words)]
    _call(here, command)


def _call(here: Path, command: list[str]) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: block.place)
def test_programs_run(here: Path, block: Block) -> None:
    if "init_process_group" in block.text:
        (here / "program.py").write_text(block.text)
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        _call(here, [sys.executable, *ranks, "program.py"])
    else:
        exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
