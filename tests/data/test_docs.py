"""What docs/data.md shows works as it is written."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import crossdock
from crossdock.config import check_settings, load_config
from crossdock.data import DataError
from crossdock.data.fields import TextField
from crossdock.data.sources import open_source

ROOT = Path(crossdock.__file__).parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text()


def write_talks(folder: Path) -> None:
    lines = [json.dumps({"text": f"Talk {number}: " + "dear friends, " * 20}) for number in range(40)]
    (folder / "talks.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("block", re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_the_settings_are_valid(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_talks(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("some")
    (tmp_path / "some.toml").write_text(block)
    config = load_config(tmp_path / "some.toml")
    check_settings(config)
    if "source" in block and not config.data.weights:
        (argument,) = re.findall(r"--data.source (\S+)`", PAGE)
        assert load_config(None, ["--data.source", argument]).data.source == config.data.source


def test_the_program_runs(tmp_path: Path) -> None:
    write_talks(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    shape = "torch.Size([2, 64])"
    lines = result.stdout.splitlines()
    assert lines[:8] == [f"{shape} {shape} {shape}"] * 8
    assert sum(map(int, lines[8:])) > 100


def test_the_messages_are_those(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = json.dumps({"text": "a"}) + "\n"
    messages = re.findall(r"^((talks|notes)\.\w+:.*)$", PAGE, re.MULTILINE)
    contents = [
        good * 16 + good[:-4],
        good * 2 + json.dumps({"id": 3, "body": "b"}) + "\n",
        "a\n" * 4 + "b\0",
        "PAR1 and no more",
    ]
    for (message, _), content in zip(messages, contents, strict=True):
        name = message.partition(":")[0]
        Path(name).write_text(content)
        with pytest.raises(DataError) as raised:
            list(open_source(name, TextField("text")).documents())
        assert str(raised.value).startswith(message.partition("...")[0].rstrip())
