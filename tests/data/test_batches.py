"""The samples of `TokenBatches` and `evaluation_batches`: rows, order, mixtures, what is predicted."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossdock.data import (
    IGNORED_LABEL,
    MIXTURE_BLOCK,
    Batch,
    DataError,
    TokenBatches,
    TokenFile,
    evaluation_batches,
    mixture_quotas,
)

SEQ_LEN = 4

in_a_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def token_file(folder: Path, lengths: list[int], *, first: int = 0, dtype: str = "uint32") -> TokenFile:
    """Documents of these lengths whose tokens count up through the file, so that a token says its place in it."""
    folder.mkdir(exist_ok=True)
    num_tokens = sum(lengths)
    (folder / "tokens.bin").write_bytes(np.arange(first, first + num_tokens).astype(dtype).tobytes())
    (folder / "documents.bin").write_bytes(np.cumsum([0, *lengths]).astype(np.int64).tobytes())
    return TokenFile(
        path=folder / "tokens.bin",
        source=folder.name,
        dtype=dtype,
        num_tokens=num_tokens,
        num_documents=len(lengths),
        vocab_size=first + num_tokens,
        end_of_text_id=None,
    )


def token_ramp(folder: Path, num_windows: int, dtype: str = "uint16") -> TokenFile:
    """One document of so many windows, and 2 tokens over, to be left out."""
    return token_file(folder, [num_windows * SEQ_LEN + 1 + 2], dtype=dtype)


def batches(*tokens: TokenFile, **changes: Any) -> TokenBatches:
    arguments: dict[str, Any] = {"seq_len": SEQ_LEN, "global_batch_size": 8, "local_batch_size": 2}
    arguments |= {"dp_rank": 0, "dp_degree": 1, "seed": 3}
    return TokenBatches(tokens, **arguments | changes)


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


def first_tokens(sampler: TokenBatches, first_sample: int, count: int) -> list[int]:
    """The first token of each of `count` samples, for a sampler of one rank."""
    steps = range(first_sample, first_sample + count, sampler.global_batch_size)
    tokens = [int(token) for step in steps for batch in sampler.at(step) for token in batch.input_ids[:, 0]]
    return tokens[:count]


# ------------------------------------------------------------------------------------------------------ steps and ranks


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
    assert batches(tokens).rows_per_source == (num_windows,)
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
        assert batch.position_ids is batch.padding_mask is None
        inputs_before = batch.input_ids.clone()
        batch.labels.fill_(-100)
        assert torch.equal(batch.input_ids, inputs_before)


def test_ids_above_int16_come_out_positive(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, [SEQ_LEN + 1], first=65531, dtype="uint16")
    assert _step(batches(tokens), 0)[0].labels[0].tolist() == [65532, 65533, 65534, 65535]


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
        ({"weights": (1.0, 2.0)}, r"weights are \[1.0, 2.0\], must be one for each of the 1 sources"),
    ],
)
def test_an_argument_out_of_range_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tokens = token_ramp(tmp_path, num_windows=8)
    with pytest.raises(DataError, match=message):
        batches(tokens, **changes)


def test_a_sample_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="first_sample is -1"):
        batches(token_ramp(tmp_path, num_windows=8)).at(-1)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_source_without_a_row_is_refused_by_name(tmp_path: Path, packing: str) -> None:
    one = token_file(tmp_path / "one", [SEQ_LEN + 1])
    assert batches(one, packing=packing).rows_per_source == (1,)
    few = token_file(tmp_path / "few", [1])
    with pytest.raises(DataError, match=r"seq_len is 4.*1 tokens of 'few'.*tokens\.bin"):
        batches(one, few, packing=packing)
    with pytest.raises(DataError, match=r"seq_len is 4"):
        batches(replace(one, num_tokens=SEQ_LEN))


# ------------------------------------------------------------------------------------------------------------- mixtures


def ramps(folder: Path, *num_windows: int) -> list[TokenFile]:
    """Sources whose tokens say which one they are of: source i has those from 10,000 i on."""
    return [
        token_file(folder / str(index), [size * SEQ_LEN + 1], first=10_000 * index)
        for index, size in enumerate(num_windows)
    ]


def source_and_row(token: int) -> tuple[int, int]:
    return token // 10_000, token % 10_000 // SEQ_LEN


def test_without_weights_an_epoch_holds_every_window_of_all_sources_once(tmp_path: Path) -> None:
    sampler = batches(*ramps(tmp_path, 5, 40, 11))
    assert sampler.rows_per_source == (5, 40, 11)
    everything = {(source, row) for source, size in enumerate((5, 40, 11)) for row in range(size)}
    for epoch in range(3):
        seen = [source_and_row(token) for token in first_tokens(sampler, epoch * 56, 56)]
        assert len(seen) == 56
        assert set(seen) == everything
        assert seen != sorted(seen)


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_quotas_are_shares_of_the_block_to_within_one(weights: list[float]) -> None:
    try:
        quotas = mixture_quotas(weights)
    except DataError:
        assert min(weights) / sum(weights) < 1 / MIXTURE_BLOCK
        return
    assert sum(quotas) == MIXTURE_BLOCK
    for quota, weight in zip(quotas, weights, strict=True):
        assert abs(quota - MIXTURE_BLOCK * weight / sum(weights)) < 1
    assert mixture_quotas([weight * 1e300 for weight in weights]) == quotas or max(weights) > 1


def test_quotas_go_to_the_largest_rests() -> None:
    assert mixture_quotas([1, 1, 1]) == (334, 333, 333)
    assert mixture_quotas([0.2506, 0.2505, 0.4989]) == (251, 250, 499)
    assert mixture_quotas([3, 7]) == (300, 700)
    assert mixture_quotas([1.5e308, 1.5e308]) == (500, 500)


@pytest.mark.parametrize("weights", [[0.0, 1], [-1, 2], [float("nan"), 1], [float("inf"), 1], [1e-4, 1]])
def test_a_weight_that_comes_to_nothing_is_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights are"):
        mixture_quotas(weights)


def test_every_block_of_a_mixture_has_the_shares_exactly_and_an_order_of_its_own(tmp_path: Path) -> None:
    whole_block = {"global_batch_size": MIXTURE_BLOCK, "local_batch_size": MIXTURE_BLOCK}
    sampler = batches(*ramps(tmp_path, 7, 30, 100), weights=(1, 2, 5), **whole_block)
    blocks = []
    for block in (0, 1, 50):
        tokens = first_tokens(sampler, block * MIXTURE_BLOCK, MIXTURE_BLOCK)
        blocks.append([source_and_row(token)[0] for token in tokens])
        assert Counter(blocks[-1]) == {0: 125, 1: 250, 2: 625}
    assert len(set(map(tuple, blocks))) == 3
    # No long runs of one source: shuffled, not one source after another.
    assert sum(here != there for here, there in pairwise(blocks[0])) > 400


@given(first=st.integers(0, 5000), data=st.data())
@in_a_folder
def test_a_mixture_goes_through_each_source_epoch_by_epoch(tmp_path: Path, first: int, data: st.DataObject) -> None:
    """By a reference that walks from sample 0: a source's samples, in order, are its epochs end to end."""
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=3))
    weights = data.draw(st.lists(st.sampled_from([1.0, 2.5, 7.0]), min_size=len(sizes), max_size=len(sizes)))
    files, seed = ramps(tmp_path, *sizes), data.draw(st.integers(0, 3))
    whole_block = {"global_batch_size": MIXTURE_BLOCK, "local_batch_size": MIXTURE_BLOCK}
    sampler = batches(*files, weights=weights, seed=seed, **whole_block)
    seen = [source_and_row(token) for token in first_tokens(sampler, 0, 2 * MIXTURE_BLOCK)]
    for source, size in enumerate(sizes):
        rows = [row for of, row in seen if of == source]
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))
    fresh = batches(*files, weights=weights, global_batch_size=12, seed=seed)
    later = [source_and_row(token) for token in first_tokens(fresh, first % 1900, 96)]
    assert later == seen[first % 1900 : first % 1900 + 96]


@given(
    layout=st.sampled_from([(1, 24), (1, 3), (2, 6), (3, 4), (4, 2), (6, 1), (24, 1)]),
    first=st.integers(0, 10**6),
    weights=st.sampled_from([(), (1, 3), (0.9, 0.1)]),
    packing=st.sampled_from(["stream", "documents"]),
    within=st.booleans(),
)
@in_a_folder
def test_rows_of_a_step_are_the_same_in_every_layout(
    tmp_path: Path, layout: tuple[int, int], first: int, weights: tuple[float, ...], packing: str, within: bool
) -> None:
    sources = [
        token_file(tmp_path / "a", [3, 9, 1, 2, 30, 4]),
        token_file(tmp_path / "b", [5, 2, 2, 17, 6], first=1000),
    ]
    dp_degree, local_batch_size = layout
    options = {"weights": weights, "packing": packing, "attend_within_documents": within, "global_batch_size": 24}
    (one,) = batches(*sources, **options, local_batch_size=24).at(first)
    by_rank = [
        batches(*sources, **options, local_batch_size=local_batch_size, dp_degree=dp_degree, dp_rank=rank).at(first)
        for rank in range(dp_degree)
    ]
    for name in ("input_ids", "labels", "position_ids", "padding_mask"):
        expected = getattr(one, name)
        parts = [getattr(batch, name) for step in zip(*by_rank, strict=True) for batch in step]
        assert all(part is None for part in parts) if expected is None else torch.equal(torch.cat(parts), expected)


# ------------------------------------------------------------------------------------------------ packing and documents

some_lengths = st.lists(st.integers(0, 14), min_size=1, max_size=25).filter(lambda lengths: max(lengths) > 1)


def rows_of(all_batches: list[Batch]) -> list[dict[str, Any]]:
    """Each row with its padding cut off, which is checked to be at its end and to predict nothing."""
    rows = []
    for batch in all_batches:
        for index in range(len(batch.input_ids)):
            padding = torch.zeros(batch.input_ids.shape[1], dtype=torch.bool)
            if batch.padding_mask is not None:
                padding = batch.padding_mask[index]
            real = int((~padding).sum())
            assert not padding[:real].any()
            assert (batch.labels[index][padding] == IGNORED_LABEL).all()
            assert (batch.input_ids[index][padding] == 0).all()
            row: dict[str, Any] = {
                "inputs": batch.input_ids[index][:real].tolist(),
                "labels": batch.labels[index][:real].tolist(),
            }
            if batch.position_ids is not None:
                row["positions"] = batch.position_ids[index][:real].tolist()
                assert batch.position_ids[index][real:].tolist() == list(range(len(padding) - real))
            rows.append(row)
    return rows


def document_rows(lengths: list[int], seq_len: int) -> list[tuple[int, int]]:
    """(first token, one past the last) of the rows of packing `documents`, by a plain loop over the documents."""
    rows: list[list[int]] = []
    position, room = 0, 0
    for length in lengths:
        if 0 < length <= room:
            rows[-1][1] += length
            room -= length
        elif length:
            start, end = position, position + length
            while end - start > seq_len + 1:
                rows.append([start, start + seq_len + 1])
                start += seq_len
            rows.append([start, end])
            room = seq_len + 1 - (end - start)
        position += length
    return [(start, end) for start, end in rows if end - start > 1]


@given(lengths=some_lengths, seq_len=st.integers(1, 9))
@in_a_folder
def test_rows_of_documents_are_whole_documents_and_only_longer_ones_are_cut(
    tmp_path: Path, lengths: list[int], seq_len: int
) -> None:
    sampler = batches(token_file(tmp_path, lengths), seq_len=seq_len, packing="documents", global_batch_size=2)
    (count,) = sampler.rows_per_source
    every_row = rows_of([batch for sample in range(0, 2 * count, 2) for batch in sampler.at(sample)])
    expected = document_rows(lengths, seq_len)
    for epoch in (every_row[:count], every_row[count:]):
        in_order = sorted(epoch, key=lambda row: row["inputs"][0])
        assert [row["inputs"] for row in in_order] == [list(range(start, end - 1)) for start, end in expected]
        assert [row["labels"] for row in in_order] == [list(range(start + 1, end)) for start, end in expected]


@given(lengths=some_lengths, seq_len=st.integers(1, 9), packing=st.sampled_from(["stream", "documents"]))
@in_a_folder
def test_within_documents_positions_begin_again_and_no_document_predicts_the_next(
    tmp_path: Path, lengths: list[int], seq_len: int, packing: Any
) -> None:
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    tokens = token_file(tmp_path, lengths)
    layout: dict[str, Any] = {"seq_len": seq_len, "local_batch_size": 3, "dp_rank": 0, "dp_degree": 1}
    layout["packing"] = packing
    plain = rows_of(list(evaluation_batches([tokens], **layout)))
    within = rows_of(list(evaluation_batches([tokens], **layout, attend_within_documents=True)))
    for row, plain_row in zip(within, plain, strict=True):
        assert row["inputs"] == plain_row["inputs"]
        for place, token in enumerate(row["inputs"]):
            begins = place == 0 or document_of[token] != document_of[token - 1]
            assert row["positions"][place] == (0 if begins else row["positions"][place - 1] + 1)
            ends = document_of[token] != document_of[token + 1]
            assert row["labels"][place] == (IGNORED_LABEL if ends else token + 1)
            assert plain_row["labels"][place] == token + 1


# ----------------------------------------------------------------------------------------------------------- evaluation


@given(
    lengths=st.lists(some_lengths, min_size=1, max_size=3),
    layout=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    seq_len=st.integers(1, 9),
    packing=st.sampled_from(["stream", "documents"]),
    within=st.booleans(),
)
@in_a_folder
def test_evaluation_predicts_every_token_once(
    tmp_path: Path, lengths: list[list[int]], layout: tuple[int, int], seq_len: int, packing: Any, within: bool
) -> None:
    files = [token_file(tmp_path / str(i), each, first=1000 * (i + 1)) for i, each in enumerate(lengths)]
    by_rank = [
        list(
            evaluation_batches(
                files,
                seq_len=seq_len,
                local_batch_size=layout[1],
                dp_rank=rank,
                dp_degree=layout[0],
                packing=packing,
                attend_within_documents=within,
            )
        )
        for rank in range(layout[0])
    ]
    assert len({len(of_rank) for of_rank in by_rank}) == 1
    in_order = [batch for step in zip(*by_rank, strict=True) for batch in step]
    assert all(batch.input_ids.shape == (layout[1], seq_len) for batch in in_order)
    assert any(not batch.padding_mask.all() for batch in in_order[-layout[0] :] if batch.padding_mask is not None)
    labels = [label for row in rows_of(in_order) for label in row["labels"] if label != IGNORED_LABEL]
    assert labels == sorted(labels)
    begins = {start for file, each in zip(files, lengths, strict=True) for start in starts(file, each)}
    firsts = {int(file.open()[0]) for file in files}
    everything = {int(token) for file in files for token in file.open()}
    assert len(set(labels)) == len(labels)
    missing = everything - set(labels)
    if packing == "stream":
        assert missing == (begins if within else firsts)
    else:
        assert firsts <= missing <= begins
        assert missing == begins or not within


def starts(file: TokenFile, lengths: list[int]) -> list[int]:
    """The first tokens of the documents that are not empty."""
    offsets = file.document_offsets()
    return [int(file.open()[offset]) for offset, length in zip(offsets, lengths, strict=False) if length]


@pytest.mark.parametrize("dp_degree", [1, 4])
def test_a_bound_on_evaluation_takes_rows_from_all_over_the_files(tmp_path: Path, dp_degree: int) -> None:
    files = ramps(tmp_path, 50, 50)

    def rows(max_samples: int) -> list[tuple[int, int]]:
        layout: dict[str, Any] = {"seq_len": SEQ_LEN, "local_batch_size": 3, "dp_degree": dp_degree}
        layout["max_samples"] = max_samples
        by_rank = [list(evaluation_batches(files, dp_rank=rank, **layout)) for rank in range(dp_degree)]
        found = rows_of([batch for step in zip(*by_rank, strict=True) for batch in step])
        return [source_and_row(row["inputs"][0]) for row in found if row["inputs"]]

    assert rows(10) == [(source, row) for source in (0, 1) for row in (0, 10, 20, 30, 40)]
    assert rows(1) == [(0, 0)]
    assert rows(100) == rows(10**6) == [(source, row) for source in (0, 1) for row in range(50)]


def test_evaluation_names_an_argument_out_of_range_at_the_call(tmp_path: Path) -> None:
    layout: dict[str, Any] = {"seq_len": SEQ_LEN, "local_batch_size": 3, "dp_rank": 0, "dp_degree": 1}
    wrong: dict[str, Any] = {"seq_len": 0, "local_batch_size": 0, "dp_rank": 1, "max_samples": 0}
    for name, value in wrong.items():
        with pytest.raises(DataError, match=f"{name} is {value}"):
            evaluation_batches([token_ramp(tmp_path, 3)], **layout | {name: value})
    with pytest.raises(DataError, match="1 tokens"):
        evaluation_batches([token_file(tmp_path, [1])], **layout)


def test_sections_of_rows_are_rows_when_joined_and_must_be_equal(tmp_path: Path) -> None:
    sampler = batches(token_file(tmp_path, [3, 9, 2, 30]), packing="documents", attend_within_documents=True)
    (batch, *_) = _step(sampler, 0)
    sections = [batch.section(index, 2).inputs(torch.device("cpu")) for index in range(2)]
    for name, tensor in batch.inputs(torch.device("cpu")).items():
        assert torch.equal(torch.cat([section[name] for section in sections], dim=1), tensor)
    with pytest.raises(DataError, match="multiple of the 3 ranks"):
        batch.section(0, 3)
