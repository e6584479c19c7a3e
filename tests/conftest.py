"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.browser import MISSING, Browser, chromium
from tests.ranks import RankPool

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
