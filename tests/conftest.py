"""Fixtures that all tests share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from crossdock.cli import main
from tests.browser import MISSING, Browser, chromium
from tests.ranks import RankPool

# A suite that runs in the background is started with SIGINT ignored, and programs that it starts would be, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads that wait for busy cores make small operations hundreds of times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks.run(world_size, function, *args)`: a function on several ranks over gloo."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """`browser.open(path)`: a page in a real browser."""
    executable = chromium()
    if executable is None:
        pytest.skip(MISSING)
    browser = Browser(executable)
    yield browser
    browser.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A skipped browser test says what to install, however quiet the output."""
    skipped = terminalreporter.stats.get("skipped", [])
    if any("browser" in report.keywords for report in skipped) and chromium() is None:
        terminalreporter.write_line(MISSING)


@pytest.fixture
def only_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., int]]:
    """`only_rank("eval", folder, ...)`: the command line, within this process, as the only rank; its exit code."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))  # nothing that was tuned on this machine
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0)

    yield call
    torch.use_deterministic_algorithms(False)  # of a run with training.deterministic
    for number, handler in handlers.items():
        signal.signal(number, handler)
