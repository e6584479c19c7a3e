"""The wheel holds what it needs and nothing else, and says what it is; slow: installed elsewhere, it trains."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DATA = {
    "crossdock/py.typed",
    "crossdock/tools/plan/devices.toml",
    "crossdock/tools/report/live.js",
    "crossdock/tools/report/page.css",
    "crossdock/tools/report/page.js",
    *(f"crossdock/configs/{path.name}" for path in (ROOT / "configs").iterdir()),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, with the setuptools that is here: a build leaves its parts behind."""
    checkout, destination = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name, follow_symlinks=False)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir", "-w"]
    subprocess.run([sys.executable, "-m", "pip", *build, destination, checkout], check=True, capture_output=True)
    (built,) = destination.glob("*.whl")
    return built


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = f"crossdock-{PROJECT['version']}.dist-info"
    expected = {
        f"{information}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")
    }
    expected |= {f"{information}/licenses/LICENSE"} | DATA
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "crossdock").rglob("*.py")}
    assert names == expected | modules
    other = {path for path in (ROOT / "crossdock").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {str(path.relative_to(ROOT)) for path in other} <= DATA | {"crossdock/configs"}
    assert wheel.stat().st_size < 2_000_000


def test_every_python_has_the_same_wheel(wheel: Path) -> None:
    assert wheel.name == f"crossdock-{PROJECT['version']}-py3-none-any.whl"


def test_the_wheel_says_what_it_is_and_what_it_needs(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert {re.split(r"[<>=! ;\[]", need)[0] for need in needs} == {
        re.split(r"[<>=! ;\[]", need)[0] for need in PROJECT["dependencies"]
    }


def test_version_of_citation_and_changelog_is_that_of_the_project() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    (version,) = re.findall(r"^version: (\S+)$", citation, re.MULTILINE)
    (date,) = re.findall(r"^date-released: (\S+)$", citation, re.MULTILINE)
    assert version == PROJECT["version"]
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[headings[0] == "Unreleased"] == f"{version}, {date}"


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment_trains(wheel: Path, tmp_path: Path) -> None:
    """With the declared dependencies and no file of the checkout but constraints.txt."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python, crossdock = tmp_path / "venv/bin/python", tmp_path / "venv/bin/crossdock"
    pip_arguments = os.environ.get("CROSSDOCK_PIP_ARGS", "").split()
    install = [python, "-m", "pip", "install", "--no-input", *pip_arguments, "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=1200)
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [crossdock, *arguments], cwd=work, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"crossdock {' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import crossdock; print(crossdock.__file__)"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(tmp_path / "venv"))
    assert run("--version") == f"crossdock {PROJECT['version']}\n"
    assert run("doctor", "--nproc", "2").endswith("all well\n")
    assert "does not fit" not in run("plan", "debug", "--gpus", "2", "--gpu", "cpu")
    small = ["--nproc", "2", "--training.seq-len", "64", "--training.steps", "3", "--job.dump-folder", "run"]
    assert "step 3/3" in run("train", "debug", *small)
    run("report", "run")
    assert (work / "run/report.html").stat().st_size > 10_000
    assert run("generate", "run", "--prompt", "Fellow citizens", "--max-new-tokens", "4").strip()
