"""The set-up script with real installs: minutes, so behind the slow marker."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_install_that_broke_off_is_made_again_and_a_whole_one_is_left_alone(tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name, follow_symlinks=False)
    script, stamp = checkout / "scripts/setup.sh", checkout / ".venv/setup.stamp"

    broken = subprocess.Popen([script], start_new_session=True)
    while not (checkout / ".venv/bin/pip").exists() and broken.poll() is None:
        time.sleep(0.2)
    time.sleep(5)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    assert not stamp.exists(), "an install that broke off is taken for a whole one"

    subprocess.run([script], check=True, timeout=1200)
    version = subprocess.run(
        [checkout / ".venv/bin/crossdock", "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout.startswith("crossdock ")

    packages = checkout / ".venv/setup.log"
    before = (packages.stat().st_mtime_ns, stamp.stat().st_mtime_ns)
    again = subprocess.run([script], check=True, timeout=60, capture_output=True, text=True)
    assert (packages.stat().st_mtime_ns, stamp.stat().st_mtime_ns) == before, "the second start did package work"
    assert again.stderr == ""
