"""expert_load.bin: what is written is read, by others too, whatever broke off in between."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from crossdock.tools.report import LOAD_FILE, LoadFileError, LoadLog, read_load

DOCS = Path(__file__).parents[2] / "docs" / "report.md"
LAYERS, EXPERTS = 3, 5


def _counts(step: int) -> torch.Tensor:
    return torch.arange(LAYERS * EXPERTS).view(LAYERS, EXPERTS) + 100 * step


def _write(path: Path, steps: list[int], resumed_step: int = 0) -> None:
    log = LoadLog(path, LAYERS, EXPERTS, resumed_step)
    for step in steps:
        log.write(step, _counts(step))
    log.close()


def _expect(path: Path, expected: list[int]) -> None:
    steps, counts, _ = read_load(path)
    assert steps.tolist() == expected
    assert counts.shape == (len(expected), LAYERS, EXPERTS)
    for step, own in zip(expected, counts, strict=True):
        np.testing.assert_array_equal(own, _counts(step).numpy())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / LOAD_FILE


def test_records_are_read_as_they_were_written(path: Path) -> None:
    _write(path, [10, 20, 30])
    _expect(path, [10, 20, 30])
    assert path.stat().st_size == 4 * (5 + 3 * (2 + LAYERS * EXPERTS)), "int32 and nothing else"


def test_a_file_without_a_record_is_empty(path: Path) -> None:
    _write(path, [])
    _expect(path, [])


def test_the_block_in_the_documentation_reads_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    _write(path, [10, 20])
    with open(path, "ab") as file:
        file.write(b"\x1e\0\0\0\0\0")  # part of a third record
    monkeypatch.chdir(path.parent)
    names: dict[str, np.ndarray] = {}
    exec(block, names)
    assert names["steps"].tolist() == [10, 20]
    np.testing.assert_array_equal(names["counts"], torch.stack([_counts(10), _counts(20)]).numpy())


@pytest.mark.parametrize(("resumed_step", "kept"), [(30, [10, 20, 30]), (25, [10, 20]), (9, []), (0, [])])
def test_a_resumed_run_drops_what_came_after(path: Path, resumed_step: int, kept: list[int]) -> None:
    _write(path, [10, 20, 30])
    _write(path, [40], resumed_step)
    _expect(path, [*kept, 40])


@pytest.mark.parametrize("lost", [1, 4, 37, 4 * (2 + LAYERS * EXPERTS) - 1])
def test_a_record_that_was_cut_off_is_dropped(path: Path, lost: int) -> None:
    _write(path, [10, 20, 30])
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    _expect(path, [10, 20])
    _write(path, [40], resumed_step=30)
    _expect(path, [10, 20, 40])


@pytest.mark.parametrize("size", [0, 7])
def test_a_header_that_was_cut_off_is_begun_again(path: Path, size: int) -> None:
    _write(path, [10])
    path.write_bytes(path.read_bytes()[:size])
    _write(path, [20], resumed_step=10)
    _expect(path, [20])


@pytest.mark.parametrize("foreign", ["shape", "magic", "version"])
def test_another_file_is_set_aside(path: Path, foreign: str, caplog: pytest.LogCaptureFixture) -> None:
    if foreign == "shape":
        log = LoadLog(path, LAYERS, EXPERTS + 1, 0)
        log.write(10, torch.ones(LAYERS, EXPERTS + 1))
        log.close()
    else:
        _write(path, [10])
        data = bytearray(path.read_bytes())
        data[{"magic": 0, "version": 4}[foreign]] += 1
        path.write_bytes(data)
    before = path.read_bytes()
    _write(path, [20], resumed_step=10)
    _expect(path, [20])
    aside = path.with_name("expert_load.1.bin")
    assert aside.read_bytes() == before
    assert "expert_load.1.bin" in caplog.text


def test_what_is_no_load_file_is_named(path: Path) -> None:
    path.write_bytes(b"something else, of some length")
    with pytest.raises(LoadFileError, match=rf"{LOAD_FILE} holds no loads"):
        read_load(path)


def test_counts_of_another_shape_are_refused(path: Path) -> None:
    log = LoadLog(path, LAYERS, EXPERTS, 0)
    with pytest.raises(ValueError, match=r"\(5, 3\), not \(3, 5\)"):
        log.write(10, torch.ones(EXPERTS, LAYERS))
    log.close()
    _expect(path, [])


def test_counts_beyond_int32_are_the_greatest_number(path: Path) -> None:
    log = LoadLog(path, 1, 2, 0)
    log.write(10, torch.tensor([[2**31, 2**31 - 2]]))
    log.close()
    assert read_load(path)[1].tolist() == [[[2**31 - 1, 2**31 - 2]]]


class _FullDisk:
    """A file on a disk that takes no more than some bytes of a write."""

    def __init__(self, file: object, takes: int) -> None:
        self._file, self._takes = file, takes

    def write(self, data: bytes) -> int:
        return self._file.write(data[: self._takes])  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_a_write_that_fails_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LoadLog(path, LAYERS, EXPERTS, 0)
    log.write(10, _counts(10))
    whole = log._file
    monkeypatch.setattr(log, "_file", _FullDisk(whole, takes=9))
    with pytest.raises(OSError, match="No space left"):
        log.write(20, _counts(20))
    monkeypatch.setattr(log, "_file", whole)
    log.write(30, _counts(30))
    log.close()
    _expect(path, [10, 30])
