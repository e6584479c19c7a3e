"""`crossdock report --watch`: a page that follows a run, for browsers on this machine alone."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from crossdock.cli import main
from crossdock.tools.report import METRICS_FILE, ReportError, watch
from tests.blocks import commands_of
from tests.browser import Browser
from tests.tools.runs import everything_of, write_loads, write_metrics

ROOT = Path(__file__).parents[2]
SECONDS = 60


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_metrics(tmp_path / "<b>run", [everything_of(step, 60) for step in range(1, 31)])
    write_loads(folder, np.random.default_rng(0).integers(10, 1000, size=(3, 2, 8)))
    return folder


def _start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "crossdock", "report", *arguments, "--watch"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def served(run: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of the run's live report, and the server's process."""
    process = _start(run.name, "--port", "0", folder=run.parent)
    assert process.stdout is not None
    address = process.stdout.readline().split()[0]
    yield address, process
    process.kill()
    process.communicate()


def _get(address: str, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, tag and body."""
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=SECONDS)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.getheader("ETag", ""), body


def test_the_page_is_made_anew_when_the_run_goes_on(run: Path, served: tuple[str, subprocess.Popen[str]]) -> None:
    address, process = served
    status, tag, html = _get(address)
    assert status == 200
    assert "&lt;b&gt;run" in html
    assert "<b>run" not in html
    assert _get(address, If_None_Match=tag) == (304, tag, "")
    write_metrics(run, [everything_of(step, 60) for step in range(1, 41)])
    deadline = time.monotonic() + SECONDS
    while (answer := _get(address, If_None_Match=tag))[0] == 304 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer[0] == 200
    assert "step 40" in answer[2]
    (run / METRICS_FILE).unlink()
    while "is not in it" not in (answer := _get(address))[2] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer[0] == 200, "a run whose first step is not done yet will have one"
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 0


def test_it_answers_to_this_machine_alone(served: tuple[str, subprocess.Popen[str]]) -> None:
    address, process = served
    port = int(address.rstrip("/").rpartition(":")[2])
    listening = [line.split() for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]]
    assert [words[1] for words in listening if words[1].endswith(f":{port:04X}") and words[3] == "0A"] == [
        f"0100007F:{port:04X}"
    ]
    # A page of somebody else's, whose name its owner has made to lead here.
    assert _get(address, Host=f"evil.example:{port}")[0] == 403
    assert _get(address, Host="localhost.evil.example")[0] == 403
    assert _get(address, Host=f"localhost:{port}")[0] == 200
    assert _get(address, path="/config.toml")[0] == 404
    assert _get(address, path="/../config.toml")[0] == 404
    assert _get(address, method="POST")[0] == 405


def test_the_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/report.md."""
    commands = [command.removeprefix("crossdock report ") for command in commands_of("docs/report.md")]
    assert sum("--watch" in command for command in commands) == 1
    assert len(commands) == 4
    for name in ("20261121-101622", "20261121-113344"):
        write_metrics(tmp_path / "runs" / "debug" / name, [everything_of(step, 9) for step in range(1, 10)])
    monkeypatch.chdir(tmp_path)
    for command in commands:
        arguments = [word.replace("/tmp/", f"{tmp_path}/") for word in command.split()]
        if "--watch" in arguments:
            arguments.remove("--watch")
            process = _start(*arguments, "--port", "0", folder=tmp_path)
            assert process.stdout is not None
            assert _get(process.stdout.readline().split()[0])[0] == 200
            process.kill()
            process.communicate()
        else:
            with pytest.raises(SystemExit, match=r"^0$"):
                main(["report", *arguments])
    assert (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["run", "--port", "70000"], "--port must be 0 to 65535"),
        (["run", "--output", "x.html"], "--output does not go with --watch"),
    ],
)
def test_a_mistake_gives_one_message(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "run").mkdir()
    process = _start(*arguments, folder=tmp_path)
    output, message = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert output == ""
    assert words in " ".join(message.split())
    assert "Traceback" not in message


def test_a_port_that_is_taken_is_named(served: tuple[str, subprocess.Popen[str]], run: Path) -> None:
    port = served[0].rstrip("/").rpartition(":")[2]
    process = _start(run.name, "--port", port, folder=run.parent)
    _, message = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert f"--port {port} cannot be listened on" in message


def test_without_the_web_server_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    with pytest.raises(ReportError, match="pip install 'crossdock\\[watch\\]'"):
        watch.serve([run], 0, print)


@pytest.mark.browser
def test_an_open_page_follows_the_run(browser: Browser, run: Path, served: tuple[str, subprocess.Popen[str]]) -> None:
    address, process = served
    page = browser.open(address)

    def wait_for(holds: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + SECONDS
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.1)
        return holds()

    def text(selector: str) -> str:
        return page.evaluate(f"document.querySelector('{selector}').textContent")

    assert text("[data-chart=lr] .readout").startswith("step 30: ")
    page.evaluate("document.querySelector('details').open = true")
    page.evaluate(
        """(() => {
          const slider = document.querySelector("#time-expert");
          slider.focus();
          slider.value = 1;
          slider.dispatchEvent(new Event("input"));
        })()"""
    )
    write_metrics(run, [everything_of(step, 60) for step in range(1, 41)])
    assert wait_for(lambda: text("[data-chart=lr] .readout").startswith("step 40: "))
    assert page.evaluate("document.querySelector('details').open"), "what was opened stays open"
    assert text(".whole output") == "step 20", "and the slider where it was"
    assert page.evaluate("document.activeElement.id") == "time-expert"
    # What is new can be pointed at.
    page.evaluate("document.querySelector('#chart-lr').focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
    assert text("[data-chart=lr] .readout").startswith("step 40: ")
    assert page.complaints() == []
    process.send_signal(signal.SIGINT)
    process.wait(SECONDS)
    assert wait_for(lambda: "does not answer" in text("#live"))
    page.close()
