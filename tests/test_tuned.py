"""The file of `crossdock tune`: what is written is read again, and taken for what it was measured for alone."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from crossdock.config.tuned import (
    TunedEntry,
    TunedFileError,
    TunedKey,
    find_entry,
    near_miss,
    read_tuned,
    tile_setting,
    tile_table,
    tuned_file,
    write_entry,
)
from crossdock.kernels import Tiles

KEY = TunedKey(
    device="Some GPU",
    torch="2.11.0",
    triton="3.6.0",
    crossdock="1.0",
    deep_ep="",
    hidden_size=2048,
    intermediate_size=768,
    num_experts=128,
    top_k=8,
    tokens_per_rank=4096,
    ep=8,
    ranks_per_machine=8,
    dtype="bfloat16",
    dispatcher="auto",
    static_shapes=False,
)


def entry(key: TunedKey = KEY, **chosen: Any) -> TunedEntry:
    defaults: dict[str, Any] = {"experts": "grouped_mm", "overlap_chunks": 2, "threads": 4, "wire_dtype": "same"}
    settings = {name: {"default": defaults[name], "chosen": value} for name, value in chosen.items()}
    return TunedEntry(key, "2026-11-22T12:00:00", settings)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuned.json"
    write_entry(path, entry(overlap_chunks=4, experts="grouped_mm"))
    (read,) = read_tuned(path)
    assert read == entry(overlap_chunks=4, experts="grouped_mm")
    assert read.choices == {"overlap_chunks": 4}, "a default that stayed is no choice"
    assert [each.name for each in path.parent.iterdir()] == ["tuned.json"]


def test_measuring_again_replaces_what_was_measured_and_leaves_the_rest(tmp_path: Path) -> None:
    path, other = tmp_path / "tuned.json", replace(KEY, ep=4)
    write_entry(path, entry(overlap_chunks=4, wire_dtype="fp8"))
    write_entry(path, entry(other, overlap_chunks=1))
    write_entry(path, entry(overlap_chunks=2))
    read = read_tuned(path)
    assert len(read) == 2
    assert [each.choices for each in read if each.key == KEY] == [{"wire_dtype": "fp8"}]
    assert [each.choices for each in read if each.key == other] == [{"overlap_chunks": 1}]


@pytest.mark.parametrize("name", [each.name for each in fields(TunedKey)])
def test_an_entry_that_differs_in_anything_is_another_ones(name: str) -> None:
    value = getattr(KEY, name)
    other = replace(KEY, **{name: not value if type(value) is bool else value * 2 if value else "2.1"})
    assert find_entry([entry(other)], KEY) is None
    assert find_entry([entry(other), entry()], KEY) == entry()
    assert near_miss([entry(other)], KEY) == f"{name} {getattr(other, name)!r}, here {value!r}"


def test_an_entry_of_quite_another_run_is_no_near_miss() -> None:
    far = replace(KEY, hidden_size=7168, num_experts=256, device="Another")
    near = replace(KEY, tokens_per_rank=8192)
    assert near_miss([entry(far)], KEY) == ""
    assert near_miss([entry(far), entry(near)], KEY) == "tokens_per_rank 8192, here 4096"
    assert near_miss([], KEY) == ""


def tiles(name: str, values: Any = (64, 128, 64, 4, 3, 0)) -> TunedEntry:
    """An entry with tiles of a kernel, and the default for another one."""
    usual = {"kernel_tiles.down.64": {"default": [64, 64, 64, 4, 3, 0], "chosen": [64, 64, 64, 4, 3, 0]}}
    own = {f"kernel_tiles.{name}": {"default": [16, 16, 16, 4, 3, 0], "chosen": list(values)}}
    return TunedEntry(KEY, "2026-11-22T12:00:00", usual | own)


def test_tiles_are_for_their_kernel_and_the_buckets_in_their_name(tmp_path: Path) -> None:
    name = tile_setting("up", (64, 256))
    assert name == "kernel_tiles.up.64.256"
    write_entry(tmp_path / "tuned.json", tiles("up.64.256"))
    (read,) = read_tuned(tmp_path / "tuned.json")
    table = tile_table(read.choices)
    assert table is not None
    assert dict(table) == {("up", bucket): Tiles(64, 128, 64, 4, 3, 0) for bucket in (64, 256)}
    assert tile_table({"experts": "triton"}) is None


def document(**changes: Any) -> str:
    whole = {"format": "crossdock tuned", "version": 1, "entries": [asdict(entry(overlap_chunks=4))]}
    return json.dumps(whole | changes)


def with_key(**changes: Any) -> str:
    return document(entries=[asdict(entry()) | {"key": asdict(KEY) | changes}])


DAMAGED = {
    "empty": ("", "no JSON"),
    "cut": (document()[:200], "no JSON"),
    "deep": ("[" * 100_000, "no JSON"),
    "list": ("[]", "no format"),
    "other": ('{"version": 1}', "no format"),
    "newer": (document(version=2), "version is 2"),
    "entries": (document(entries=3), "TypeError"),
    "entry": (document(entries=[3]), "TypeError"),
    "no key": (document(entries=[{"date": "", "settings": {}}]), "key"),
    "field": (with_key(color="red"), "color"),
    "type": (with_key(ep="8"), "ep is '8', not of type int"),
    "switch": (with_key(static_shapes=0), "static_shapes is 0, not of type bool"),
    "setting": (document(entries=[asdict(entry()) | {"settings": {"experts": "cpu"}}]), "TypeError"),
    "chosen": (document(entries=[asdict(entry()) | {"settings": {"experts": {}}}]), "chosen"),
    "backend": (document(entries=[asdict(entry(experts="abacus"))]), "abacus"),
    "chunks": (document(entries=[asdict(entry(overlap_chunks=-1))]), "overlap_chunks"),
    "chunks' type": (document(entries=[asdict(entry(overlap_chunks="4"))]), "overlap_chunks"),
    "threads": (document(entries=[asdict(entry(threads=0))]), "threads is 0"),
    "kernel": (document(entries=[asdict(tiles("sideways.64"))]), "there is none"),
    "bucket": (document(entries=[asdict(tiles("up.63"))]), "63 rows per slot"),
    "no bucket": (document(entries=[asdict(tiles("up.many"))]), "many"),
    "tiles": (document(entries=[asdict(tiles("up.64", values=[64, 64]))]), "no tiles"),
    "tiles' size": (document(entries=[asdict(tiles("up.64", values=[63, 64, 64, 4, 3, 0]))]), "rows = 63"),
    "wire": (document(entries=[asdict(entry(wire_dtype="fp4"))]), "wire_dtype"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    text, says = DAMAGED[name]
    path = tmp_path / "tuned.json"
    path.write_text(text)
    for action in (lambda: read_tuned(path), lambda: write_entry(path, entry())):
        with pytest.raises(TunedFileError) as raised:
            action()
        assert str(path) in str(raised.value)
        assert says in str(raised.value)
    assert path.read_text() == text


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    for name in ("binary", "nowhere", "."):
        with pytest.raises(TunedFileError, match=str(tmp_path)):
            read_tuned(tmp_path / name)


def test_the_file_lies_in_the_cache_folder_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/some")
    for cache, folder in (("/scratch", "/scratch"), ("", "/home/some/.cache"), ("relative", "/home/some/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert tuned_file("auto") == Path(folder, "crossdock", "tuned.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned_file("auto") == Path("/home/some/.cache/crossdock/tuned.json")
    assert tuned_file("/some/file.json") == Path("/some/file.json")
    assert tuned_file("off") is None
