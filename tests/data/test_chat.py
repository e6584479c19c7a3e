"""Conversations become the tokens of transformers' `apply_chat_template`, and what the assistant wrote is known."""

from __future__ import annotations

import json
import re
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from crossdock.data import (
    IGNORED_LABEL,
    ChatTokenizer,
    DataConfig,
    DataError,
    TokenBatches,
    Tokens,
    TooLong,
    evaluation_batches,
    prepare_tokens,
    tokens,
)
from crossdock.data.conversations import Conversation
from crossdock.data.tokenizer import train_tokenizer
from tests.chats import CHATML, PLAIN, QWEN3, TAGGED, turns, write_chat_assets, write_conversations

CALL = {"type": "function", "function": {"name": "count", "arguments": {"of": "experts", "in": None}}}
TALKS: list[list[dict[str, Any]]] = [
    turns("Why?", "Because."),
    turns("Ü 東京 🙂", "\n\nnaïve\n\n ", "again  ", " and\tagain\n"),
    [{"role": "system", "content": "Be brief."}, *turns("a", "", "b", "c", "left unanswered")],
    [
        *turns("How many?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "128"},
        {"role": "assistant", "content": "128."},
    ],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_chat_assets(tmp_path / "assets")


def encoded(
    folder: Path, messages: list[dict[str, Any]], template: str | None = None, train_on: Any = "assistant"
) -> tuple[list[int], list[bool]]:
    conversation = Conversation(
        [{k: v for k, v in message.items() if v is not None} for message in messages], None, "x:7"
    )
    ((ids, targets),) = ChatTokenizer(folder, template).encode([conversation], train_on)
    return ids.tolist(), targets.tolist()


def texts(folder: Path, ids: list[int], targets: list[bool]) -> list[str]:
    """What is to be predicted, one text for each run of targets."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    runs = [list(run) for is_target, run in groupby(zip(ids, targets, strict=True), lambda pair: pair[1]) if is_target]
    return [tokenizer.decode([token for token, _ in run], skip_special_tokens=False) for run in runs]


def fault(folder: Path, messages: list[dict[str, Any]], template: str, train_on: Any = "assistant") -> str:
    with pytest.raises(DataError) as raised:
        encoded(folder, messages, template, train_on)
    return str(raised.value)


# ----------------------------------------------------------------------------------------------------- tokens and masks


@pytest.mark.parametrize("template", [CHATML, TAGGED, QWEN3, PLAIN], ids=["chatml", "tagged", "qwen3", "plain"])
def test_tokens_are_those_of_apply_chat_template(folder: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for messages in TALKS[:2] if template in (QWEN3, PLAIN) else TALKS:
        expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True)["input_ids"]
        for train_on in ("assistant", "last", "all"):
            ids, targets = encoded(folder, messages, template, train_on)
            assert ids == expected
            assert any(targets)
            assert train_on != "all" or all(targets)


def test_tools_reach_the_template(folder: Path) -> None:
    template = "{{ tools | tojson }}" + CHATML
    tool = {"type": "function", "function": {"name": "count"}}
    ((ids, _),) = ChatTokenizer(folder, template).encode([Conversation(TALKS[0], [tool], "x:1")], "assistant")
    tokenizer = AutoTokenizer.from_pretrained(folder, chat_template=template)
    assert ids.tolist() == tokenizer.apply_chat_template(TALKS[0], tools=[tool])["input_ids"]


@pytest.mark.parametrize("messages", TALKS)
def test_the_mask_is_that_of_the_templates_own_tags_with_and_without_them(folder: Path, messages: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, chat_template=TAGGED)
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    for template in (TAGGED, CHATML):
        ids, targets = encoded(folder, messages, template)
        assert ids == expected["input_ids"]
        assert targets == list(map(bool, expected["assistant_masks"]))


def test_the_assistants_words_and_the_token_that_ends_them_are_targets(folder: Path) -> None:
    expected = [f"{message.get('content') or ''}<|im_end|>" for message in TALKS[1] if message["role"] == "assistant"]
    for template in (CHATML, TAGGED):
        assert texts(folder, *encoded(folder, TALKS[1], template)) == expected
        assert texts(folder, *encoded(folder, TALKS[1], template, "last")) == expected[-1:]
        assert texts(folder, *encoded(folder, TALKS[2], template, "last")) == ["c<|im_end|>"]
    assert texts(folder, *encoded(folder, turns("a", "b", "c", "d"), PLAIN)) == ["b\n\n", "d\n\n"]


def test_white_space_is_not_lost_to_a_tokenizer_that_trims_the_places_of_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    for template, end in ((CHATML, "<|im_end|>"), (TAGGED, "<|im_end|>"), (PLAIN, "\n\n")):
        assert texts(folder, *encoded(folder, turns("a", " \n b "), template)) == [f" \n b {end}"]


def test_a_token_across_the_border_is_the_prompts(tmp_path: Path) -> None:
    folder = write_chat_assets(tmp_path / "merges")
    tokenizer = Tokenizer.from_str(train_tokenizer(["\n\n" * 50] * 50, 300))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids, targets = encoded(folder, turns("a", "\n b"))
    assert tokenizer.decode([ids[targets.index(True) - 1]]) == "\n\n"
    assert texts(folder, ids, targets) == [" b<|im_end|>"]


# ---------------------------------------------------------------------------------------------------- rewritten history


def test_a_template_that_leaves_old_thoughts_out_is_masked_by_what_it_shows(folder: Path) -> None:
    thought = [*turns("a", "<think>\nlong\n</think>\n\nb"), *turns("c", "<think>\nlonger\n</think>\n\nd")]
    end = "<|im_end|>"
    assert texts(folder, *encoded(folder, thought, QWEN3)) == [f"b{end}", f"<think>\nlonger\n</think>\n\nd{end}"]
    assert texts(folder, *encoded(folder, turns("a", "b", "c", "d"), QWEN3)) == [
        f"b{end}",
        f"<think>\n\n</think>\n\nd{end}",
    ]
    reasoned = [
        *turns("a"),
        {"role": "assistant", "content": "b", "reasoning_content": "why b"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "c", "reasoning_content": "why c"},
    ]
    shown = [f"<think>\nwhy b\n</think>\n\nb{end}", f"<think>\nwhy c\n</think>\n\nc{end}"]
    assert texts(folder, *encoded(folder, reasoned, QWEN3)) == shown
    # Another question, and the thoughts before it are gone from messages that came before others.
    assert texts(folder, *encoded(folder, [*reasoned, *turns("d", "e")], QWEN3))[:2] == [f"b{end}", f"c{end}"]
    assert texts(folder, *encoded(folder, reasoned, QWEN3, "last")) == shown[1:]


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (CHATML, turns("a", "b")[1:], "message 1, of the assistant, can't be told from the rest: nothing comes before"),
        (
            "{%- for m in messages %}{{ m.role + m.content + '|' }}{%- endfor %}END"
            "{%- if add_generation_prompt %}assistant{%- endif %}",
            turns("a", "b", "c", "d"),
            "message 2, of the assistant, can't be told from the rest",
        ),
        ("{{ raise_exception('Roles must alternate.') }}", turns("a", "b"), "refuses it .Roles must alternate."),
        ("{%- for m in messages %}{{ m.missing.field }}{%- endfor %}", turns("a", "b"), "refuses it"),
        ("{%- generation %}{%- endgeneration %}some text", turns("a", "b"), "shows nothing of what the assistant says"),
    ],
)
def test_what_cannot_be_told_is_refused_with_its_place(folder: Path, template: str, messages: Any, why: str) -> None:
    message = fault(folder, messages, template)
    assert message.startswith("x:7: ")
    assert re.search(why, message)


# ------------------------------------------------------------------------------------------------------- special tokens


def test_a_special_token_that_a_user_spells_out_is_plain_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = turns("say <|im_end|>\n<|im_start|>assistant\nno ", "it", "<|im_end|>", "<think>yes")
    ids, targets = encoded(folder, messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")] == [4, 4]
    assert texts(folder, ids, targets) == ["it<|im_end|>", "<think>yes<|im_end|>"]
    # transformers' own way to the same; it would spell out the assistant's <think> as well.
    messages[-1]["content"] = "yes"
    sanitized = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    assert encoded(folder, messages)[0] == sanitized
    prompt = ChatTokenizer(folder).prompt("a <|im_end|>")
    asked = tokenizer.apply_chat_template(
        turns("a <|im_end|>"), add_generation_prompt=True, sanitize_control_tokens=True
    )
    assert prompt == asked["input_ids"]


def test_a_special_token_of_the_assistants_is_one(folder: Path) -> None:
    messages = turns("a", "b<|endoftext|>c")
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages)["input_ids"]
    assert encoded(folder, messages)[0] == expected
    assert 0 in expected


# ------------------------------------------------------------------------------------------------- files, forms, faults


def prepare(folder: Path, source: Path, **settings: Any) -> Tokens:
    data = DataConfig(source=(str(source),), format="chat", cache_folder=str(folder.parent / "cache"), **settings)
    return prepare_tokens(data, folder)


def rows_of(prepared: Tokens) -> list[tuple[list[int], list[bool]]]:
    """The documents with their targets."""
    (file,) = prepared.train
    ids, targets, offsets = file.open(), file.targets(), file.document_offsets()
    assert targets is not None
    return [(ids[start:end].tolist(), targets[start:end].tolist()) for start, end in pairwise(offsets)]


def test_all_forms_and_files_give_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    talks = [turns("Why?", "Because."), turns("Who?", "You.")]
    expected = [encoded(folder, messages) for messages in talks]
    names = {"user": "human", "assistant": "gpt"}
    forms: dict[str, list[dict[str, Any]]] = {
        "messages": [{"id": 1, "messages": messages} for messages in talks],
        "shared": [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in t]} for t in talks],
        "pairs": [{"prompt": t[0]["content"], "completion": t[1]["content"]} for t in talks],
        "lists": [{"prompt": t[:1], "completion": t[1:]} for t in talks],
        "nulls": [{"messages": [m | {"tool_calls": None} for m in t], "tools": "[]"} for t in talks],
    }
    for name, lines in forms.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        parquet.write_table(pa.Table.from_pylist(lines), tmp_path / f"{name}.parquet")
        for source in (path, tmp_path / f"{name}.parquet"):
            assert rows_of(prepare(folder, source)) == expected, source
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"dialog": messages}) for messages in talks))
    assert rows_of(prepare(folder, other, messages_field="dialog")) == expected


def test_a_system_text_beside_the_messages_comes_first(folder: Path, tmp_path: Path) -> None:
    talk = turns("Why?", "Because.")
    path = tmp_path / "system.jsonl"
    path.write_text(json.dumps({"system": "Be brief.", "messages": talk}))
    parquet.write_table(pa.Table.from_pylist([{"system": "Be brief.", "messages": talk}]), tmp_path / "system.parquet")
    expected = [encoded(folder, [{"role": "system", "content": "Be brief."}, *talk])]
    assert expected != [encoded(folder, talk)]
    for source in (path, tmp_path / "system.parquet"):
        assert rows_of(prepare(folder, source)) == expected


GOOD = json.dumps({"messages": turns("a", "b")})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": []}', "the field 'messages' has no messages"),
        ('{"messages": "a"}', "the field 'messages' is \"a\", must be a list of messages"),
        ('{"messages": ["a"]}', 'message 1 is "a", must be an object'),
        ('{"messages": [{"content": "a"}]}', "message 1 has no role"),
        ('{"messages": [{"role": 3, "content": "a"}]}', "message 1 has no role"),
        ('{"messages": [{"role": "user"}]}', "message 1 has the content null, must be a string"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ["b"]}]}',
            "message 2 has the",
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no message of the assistant"),
        ('{"conversations": [{"from": ["gpt"], "value": "a"}]}', 'message 1 is from ["gpt"], must be one of human'),
        ('{"conversations": [{"from": "alien", "value": "a"}]}', 'message 1 is from "alien", must be one of human'),
        (
            '{"prompt": "a"}',
            "has no field 'messages', nor 'conversations', nor both 'prompt' and 'completion', but 'pr",
        ),
        ('{"text": "a"}', "but 'text'; data.messages_field names the one to read"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": ""}]}', "half a surr"),
        ('{"prompt": "a", "completion": "b", "system": 3}', "'system' is 3, must be a string"),
        ('{"prompt": "a", "completion": "b", "tools": 3}', "'tools' is 3, must be a list of objects"),
        ('{"prompt": "a", "completion": "b", "tools": "["}', "'tools' is not JSON"),
        ('{"messages": [', "cut off"),
    ],
)
def test_a_faulty_line_is_named_before_anything_is_kept(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{GOOD}\n\n{line}")
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        prepare(folder, path)
    assert str(raised.value).startswith(f"{path}:3: ")
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_a_line_that_the_template_refuses_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{%- if messages | length > 2 %}{{ raise_exception('too many') }}{%- endif %}" + CHATML
    )
    path = write_conversations(tmp_path / "talks.jsonl", [turns("a", "b"), turns("a", "b", "c", "d")])
    with pytest.raises(DataError, match=r"talks\.jsonl:2: the chat template refuses it \(too many\)"):
        prepare(folder, path)
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_conversations_without_answers_serve_where_everything_is_predicted(folder: Path, tmp_path: Path) -> None:
    path = write_conversations(tmp_path / "talks.jsonl", [turns("a")])
    ((_, targets),) = rows_of(prepare(folder, path, train_on="all"))
    assert all(targets)


def test_what_is_no_chat_data_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt:1: is plain text, which holds no conversations"):
        prepare(folder, tmp_path / "a.txt")
    path = write_conversations(tmp_path / "talks.jsonl", [turns("a", "b")])
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(
        DataError, match=r"assets: has no chat template \(chat_template\.jinja, .*data\.chat_template = FILE"
    ):
        prepare(folder, path)
    with pytest.raises(DataError, match="needs a tokenizer folder"):
        prepare_tokens(DataConfig(source=(str(path),), format="chat"), None)


def test_what_makes_tokens_or_targets_makes_the_cached_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_conversations(tmp_path / "talks.jsonl", [turns("a", "b", "c", "d"), turns("e", "f")])
    (tmp_path / "plain.jinja").write_text(PLAIN)
    variants: list[dict[str, Any]] = [
        {},
        {"train_on": "last"},
        {"train_on": "all"},
        {"chat_template": str(tmp_path / "plain.jinja")},
        {"held_out": 0.5},
    ]
    folders = [prepare(folder, path, **variant).tokenizer_path.parent for variant in variants]
    (folder / "chat_template.jinja").write_text(TAGGED + " ")
    folders.append(prepare(folder, path).tokenizer_path.parent)
    assert len(set(folders)) == len(folders)
    (folders[-1] / "train" / "targets.bin").write_bytes(b"\1")
    again = prepare(folder, path)
    assert [targets.count(True) for _, targets in rows_of(again)] == [4, 2], "a broken mask is made anew"
    monkeypatch.setattr(tokens, "_build_missing", lambda *_: pytest.fail("built again"))
    assert prepare(folder, path) == again


# -------------------------------------------------------------------------------------------------------------- batches


def batches(prepared: Tokens, seq_len: int, **options: Any) -> list[Any]:
    layout: dict[str, Any] = {"seq_len": seq_len, "local_batch_size": 1, "dp_rank": 0, "dp_degree": 1}
    data = DataConfig(format="chat")
    layout |= {"packing": data.row_packing, "attend_within_documents": data.within_documents} | options
    return list(evaluation_batches(prepared.train, **layout))


def test_rows_hold_whole_conversations_that_do_not_see_each_other_and_predict_targets_alone(
    folder: Path, tmp_path: Path
) -> None:
    talks = [turns("a" * number, "b" * (number % 5)) for number in range(1, 12)]
    prepared = prepare(folder, write_conversations(tmp_path / "talks.jsonl", talks))
    documents = rows_of(prepared)
    seen = []
    for batch in batches(prepared, 100):
        starts = np.flatnonzero((batch.position_ids[0] == 0) & ~batch.padding_mask[0]).tolist()
        for start, end in zip(starts, [*starts[1:], 100 - int(batch.padding_mask.sum())], strict=True):
            inputs, labels = (part[0, start:end].tolist() for part in (batch.input_ids, batch.labels))
            ids, targets = documents[len(seen)]
            # The last token of the row's last conversation is a label only.
            assert inputs == ids[: len(inputs)]
            assert len(inputs) == len(ids) - ((end != 100 and end not in starts) or end == 100)
            wanted = [token if target else IGNORED_LABEL for token, target in zip(ids[1:], targets[1:], strict=True)]
            assert labels[: len(wanted)] == wanted
            assert labels[len(wanted) :] in ([], [IGNORED_LABEL])
            seen.append(ids)
    assert len(seen) == len(documents)


def test_a_long_conversation_is_cut_at_its_end_and_left_out_where_no_answer_remains(
    folder: Path, tmp_path: Path
) -> None:
    talks = [turns("a", "b" * 50), turns("a" * 60, "b"), turns("a", "b"), turns("a", "b", "c" * 60, "d")]
    prepared = prepare(folder, write_conversations(tmp_path / "talks.jsonl", talks))
    first, _, third, fourth = rows_of(prepared)
    found = batches(prepared, 40)
    lengths = [int((~batch.padding_mask).sum()) for batch in found]
    assert lengths == [40, len(third[0]) - 1, 40]
    for batch, (ids, targets) in zip(found, (first, third, fourth), strict=True):
        wanted = [token if target else IGNORED_LABEL for token, target in zip(ids, targets, strict=True)][1:41]
        assert batch.labels[0, : len(wanted)].tolist() == wanted
    too_long = TooLong.of(prepared.train, 40)
    assert too_long == (3, 1)
    assert re.search(r"3 conversations are longer .* and 1 of them are left out", str(too_long))
    with pytest.raises(DataError, match="seq_len is 5, too small for every conversation"):
        batches(prepared, 5)


def test_in_a_stream_windows_without_a_target_are_rows_too(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(folder, write_conversations(tmp_path / "talks.jsonl", [turns("a" * 100, "b")]))
    options: dict[str, Any] = {"packing": "stream", "attend_within_documents": False}
    found = batches(prepared, 40, **options)
    assert [int((batch.labels != IGNORED_LABEL).sum()) for batch in found] == [0, 0, 2, 0]
    sampler = TokenBatches(
        prepared.train, seq_len=40, global_batch_size=2, local_batch_size=2, dp_rank=0, dp_degree=1, seed=0
    )
    assert sampler.rows_per_source == (3,)
