"""What SECURITY.md promises: nothing that is read is run, names stay names, one machine's ranks keep to themselves."""

from __future__ import annotations

import ast
import io
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from crossdock.checkpoint import CheckpointError, HFCheckpoint, folder_problem, write_checksums
from crossdock.config import ConfigError, load_config, validate
from crossdock.data import DataConfig, DataError, prepare_tokens
from crossdock.data.chat import ChatTokenizer
from crossdock.models import copy_assets
from crossdock.tools.report import write_report
from crossdock.train.record import lock_folder
from tests.chats import CHATML, write_chat_assets
from tests.tiny import by_hand, speeches, write_assets, write_hf_model
from tests.tools.runs import metrics_of, write_metrics

SOURCES = sorted((Path(__file__).parents[1] / "crossdock").rglob("*.py"))
SECONDS = 120


# Nothing that is read is run.


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """The calls of a module, by what they are written as."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


FORBIDDEN = {
    "torch.load": "weights are safetensors",
    "pickle.load": "nothing is unpickled",
    "pickle.loads": "nothing is unpickled",
    "eval": "",
    "exec": "",
    "compile": "",
    "__import__": "",
    "os.system": "",
    "os.popen": "",
    "yaml.load": "settings are TOML",
    "np.load": "",
    "joblib.load": "",
    "shutil.unpack_archive": "no archives",
    "tarfile.open": "no archives",
    "zipfile.ZipFile": "no archives",
}
# What is imported by a name, from a fixed list of names.
IMPORTERS = {"train/trackers.py", "dispatch/deepep_buffers.py"}


def test_no_source_loads_what_could_run() -> None:
    assert len(SOURCES) > 100
    for path in SOURCES:
        name = "/".join(path.parts[path.parts.index("crossdock") + 1 :])
        tree = ast.parse(path.read_text())
        for called, node in _calls(tree):
            assert called not in FORBIDDEN, f"{name}: {called}: {FORBIDDEN[called]}"
            assert called != "importlib.import_module" or name in IMPORTERS, name
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            trusts = keywords.get("trust_remote_code")
            assert trusts is None or ast.literal_eval(trusts) is False, name
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                assert trusts is not None, f"{name}: {called} without trust_remote_code=False asks, and may be told yes"
        bases = {ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases}
        assert "pickle.Unpickler" not in bases or name == "checkpoint/foreign.py"


def with_own_code(folder: Path, marker: Path, **config: Any) -> Path:
    """Assets with code of their own, which leaves a marker wherever it is run."""
    write_chat_assets(folder, CHATML)
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (folder / "own.py").write_text(
        f"{code}from transformers import PreTrainedConfig, PreTrainedTokenizerFast\n"
        "class OwnConfig(PreTrainedConfig):\n    pass\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    for name, added in {
        "config.json": {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}, **config},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}},
    }.items():
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | added))
    return folder


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks whether to run code is told yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.mark.usefixtures("yes")
def test_code_of_a_model_folder_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "run by somebody"
    known = with_own_code(tmp_path / "known", marker)
    unknown = with_own_code(tmp_path / "unknown", marker, model_type="of_its_own")
    validate(load_config(None, ["--model.hf-assets-path", str(known), "--training.seq-len", "64"]), 2)
    ChatTokenizer(known).prompt("hello")
    for name in ("qwen3", "generic"):
        config = load_config(None, ["--model.hf-assets-path", str(unknown), "--model.name", name])
        with pytest.raises(ConfigError, match=r"of_its_own") as caught:
            validate(config, 2)
        assert caught.value.field == "model.hf_assets_path"
    assert "auto_map" in str(caught.value)
    assert not marker.exists()
    # An export names none either.
    (tmp_path / "copy").mkdir()
    copy_assets(known, tmp_path / "copy", "F32")
    assert "auto_map" not in (tmp_path / "copy/config.json").read_text()


def test_a_config_file_cannot_ask_for_it(tmp_path: Path) -> None:
    for section in ("model", "data", "training"):
        (tmp_path / "user.toml").write_text(f"[{section}]\ntrust_remote_code = true\n")
        with pytest.raises(ConfigError, match="does not exist"):
            load_config(tmp_path / "user.toml")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch MARKER') }}",
        "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
        "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
        "{{ (messages | attr('__class__')).__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'].codecs.open('MARKER', 'w') }}",
        "{{ messages.append(messages[0]) }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_is_rendered_in_a_sandbox(tmp_path: Path, attack: str) -> None:
    marker = tmp_path / "marker"
    tokenizer = ChatTokenizer(write_chat_assets(tmp_path / "assets", attack.replace("MARKER", str(marker))))
    with pytest.raises(DataError, match="the chat template refuses it"):
        tokenizer.prompt("hello")
    assert not marker.exists()


# Names stay in their folder.


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", ".", "", "sub/file.safetensors", 7])
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, name: object) -> None:
    folder = write_hf_model(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="it must be the name of a file in the same folder"):
        HFCheckpoint.open(folder)


def test_checksums_name_files_of_their_folder_alone(tmp_path: Path) -> None:
    folder = write_assets(tmp_path / "assets")
    write_checksums(folder)
    assert folder_problem(folder) == ""
    path = folder / "checksums.json"
    sums = json.loads(path.read_text())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    path.write_text(json.dumps(sums | {"../config.json": sums["config.json"]}))
    assert "is missing" in folder_problem(folder)


def test_links_out_of_a_folder_are_not_copied(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"password": 1}')
    folder = write_assets(tmp_path / "model")
    (folder / "special_tokens_map.json").symlink_to(secret)
    (tmp_path / "copy").mkdir()
    with pytest.raises(OSError, match=r"special_tokens_map\.json is a link to a file elsewhere, which is not copied"):
        copy_assets(folder, tmp_path / "copy", "F32")
    assert "password" not in "".join(path.read_text() for path in (tmp_path / "copy").iterdir())


def test_the_hubs_cache_is_copied_though_it_is_made_of_links(tmp_path: Path) -> None:
    snapshot = write_assets(tmp_path / "models--a--b/snapshots/0123")
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir()
    (snapshot / "tokenizer.json").rename(blobs / "abc")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (tmp_path / "copy").mkdir()
    copy_assets(snapshot, tmp_path / "copy", "F32")
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == (blobs / "abc").read_bytes()
    assert not (tmp_path / "copy/tokenizer.json").is_symlink()


# Folders that others may write to.


def test_a_planted_lock_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"\.lock"):
        lock_folder(tmp_path / "run")
    assets = write_assets(tmp_path / "assets")
    data = DataConfig(source=(str(speeches(assets)),), cache_folder=str(tmp_path / "cache"))
    folder = prepare_tokens(data, assets).train[0].path.parents[1]
    for lock in (tmp_path / "cache").glob(".*.lock"):
        lock.unlink()
        lock.symlink_to(victim)
    (folder / "tokens.json").unlink()
    with pytest.raises(OSError, match=r"\.lock"):
        prepare_tokens(data, assets)
    assert victim.read_text() == "precious"


def test_a_cache_cannot_choose_what_its_bytes_are(tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets")
    data = DataConfig(source=(str(speeches(assets)),), cache_folder=str(tmp_path / "cache"))
    first = prepare_tokens(data, assets).train[0]
    path = first.path.parents[1] / "tokens.json"
    path.write_text(path.read_text().replace("uint16", "object"))
    assert prepare_tokens(data, assets).train[0].dtype == "uint16", "built again"


# The report.

EVIL = """<script>alert(1)<!--"onload='alert(1)' x="<img src=x onerror=alert(1)>&lt;"""


class _Structure(HTMLParser):
    """Elements with the names of their attributes, and the content of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)


def report_of(folder: Path, name: str) -> str:
    """The report of a run in which all that has a name has this one."""
    run = folder / name.replace("/", "")
    rows = [metrics_of(step, 20) | {f"{name}_loss": 1.0, f"{name}": 2.0, "validation_loss": 1.0} for step in (1, 2)]
    write_metrics(run, rows)
    quoted = json.dumps(name)
    text = f"[model]\nflavor = {quoted}\nhf_assets_path = {quoted}\n[metrics]\nproject = {quoted}\n"
    text += f"[data]\nsource = [{quoted}, {quoted}]\ntext_field = {quoted}\n"
    (run / "config.toml").write_text(by_hand(text))
    (run / "expert_load.bin").write_bytes(b"no loads")
    return write_report(run).read_text()


def test_the_report_shows_every_name_as_text(tmp_path: Path) -> None:
    plain, evil = (_Structure(report_of(tmp_path / str(index), name)) for index, name in enumerate(["plain", EVIL]))
    assert evil.elements == plain.elements, "a name has become an element or an attribute"
    assert evil.scripts == plain.scripts
    assert len(evil.scripts) == 1
    assert not any(attribute.startswith("on") for _, attributes in evil.elements for attribute in attributes)


def test_the_report_says_why_settings_cannot_be_read_as_text(tmp_path: Path) -> None:
    run = write_metrics(tmp_path / "run", [metrics_of(1, 1)])
    for text in (f"[training]\n{json.dumps(EVIL)} = 1\n", f"[training]\ndtype = {json.dumps(EVIL)}\n", EVIL):
        (run / "config.toml").write_text(by_hand(text))
        html = write_report(run).read_text()
        assert "could not be read" in html
        assert "alert(1)<" not in html.replace("alert(1)</script>", "")
        assert not any(tag == "img" for tag, _ in _Structure(html).elements)


# Sockets.


def _listening(pid: int) -> set[str]:
    """Addresses, in hexadecimal digits, at which a process listens."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(descriptor))
        except OSError:  # closed meanwhile
            continue
    addresses = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[index] for index in (1, 3, 9))
            if state == "0A" and f"socket:[{inode}]" in sockets:
                addresses.add(local.partition(":")[0])
    return addresses


def _descendants(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in tasks for child in path.read_text().split()]
    return children + [descendant for child in children for descendant in _descendants(child)]


LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}
ANYWHERE = {"00000000", "0" * 32}


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="needs Linux")
def test_on_one_machine_only_torchruns_stores_can_be_reached(tmp_path: Path) -> None:
    assets = write_assets(tmp_path / "assets")
    run = tmp_path / "run"
    arguments = ["--nproc", "2", "--job.dump-folder", run, "--model.hf-assets-path", assets]
    arguments += ["--data.source", speeches(assets), "--data.cache-folder", tmp_path / "cache"]
    arguments += ["--training.steps", "100000", "--training.seq-len", "32", "--training.local-batch-size", "2"]
    arguments += ["--parallelism.expert-parallel-degree", "2"]
    arguments += ["--checkpoint.async-mode", "async", "--checkpoint.interval", "5"]  # whose thread has a group
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    process = subprocess.Popen(
        [sys.executable, "-m", "crossdock", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while not (run / "checkpoint/step-00000005").is_dir():
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < deadline, "the run did not start"
            time.sleep(0.1)
        listening = {pid: _listening(pid) for pid in [process.pid, *_descendants(process.pid)]}
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=SECONDS)
    stores = listening.pop(process.pid)
    assert stores <= ANYWHERE | LOOPBACK
    assert len(listening) >= 2, "the ranks"
    assert sum(bool(addresses) for addresses in listening.values()) >= 2, "each listens for the other"
    assert set().union(*listening.values()) <= LOOPBACK


def test_ranks_of_several_machines_are_not_pinned() -> None:
    code = """
import os, torch.distributed as dist
from crossdock.train.launch import run_rank
dist.init_process_group = lambda *_, **__: None
for local, chosen in (("1", None), ("1", "eth7"), ("2", None)):
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if chosen:
        os.environ["GLOO_SOCKET_IFNAME"] = chosen
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": local}
    run_rank(lambda device: print(os.environ.get("GLOO_SOCKET_IFNAME")) or 1, environment)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.stdout.split() == ["lo", "eth7", "None"], done.stderr
