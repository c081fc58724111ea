"""Conversations: what the chat template makes of them, and which of the tokens the assistant writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import templates
from tests.data.templates import byte_tokenizer
from wrapq.data.samples import Samples, build_samples
from wrapq.data.sources.base import make_source
from wrapq.errors import CalibrationError

TALK = [
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, två."},
]
SYSTEM = {"role": "system", "content": "Be short."}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def source(folder: Path, *rows: dict[str, Any] | list[dict[str, Any]]) -> Any:
    path = folder / "chats.jsonl"
    given = (row if isinstance(row, dict) else {"messages": row} for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return make_source("jsonl", {"path": str(path)})


def built(made: Any, tokenizer: Any, seq_len: int = 999, **options: Any) -> Samples:
    return build_samples(made, tokenizer, None, seq_len, None, **options)


def words(tokenizer: Any, found: Samples, row: int = 0) -> str:
    mask = found.attention_mask
    return tokenizer.decode(found.input_ids[row] if mask is None else found.input_ids[row][mask[row]])


def scored(tokenizer: Any, found: Samples, row: int = 0) -> str:
    assert found.scored is not None
    return tokenizer.decode(found.input_ids[row][found.scored[row]])


@pytest.mark.parametrize("name", ["LLAMA3", "CHATML", "GEMMA", "MISTRAL"])
@pytest.mark.parametrize("begins", ["<bos>", "", "[gMASK] <bos>"])
def test_a_row_is_what_the_template_writes_and_begins_once(tmp_path: Path, name: str, begins: str) -> None:
    tokenizer = byte_tokenizer(getattr(templates, name), begins)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    start = begins.replace(" ", "")
    expected = start + (rendered.removeprefix(start) if start == "<bos>" else rendered)
    for score in (None, "all", "assistant"):
        found = built(source(tmp_path, TALK), tokenizer, pack=False, score=score)
        assert words(tokenizer, found) == expected
        assert begins != "<bos>" or (found.input_ids == tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LLAMA3", "Two.<|eot_id|>Yes, två.<|eot_id|>"),
        ("CHATML", "Two.<|im_end|>Yes, två.<|im_end|>"),
        ("MARKED", "Two.<|im_end|>Yes, två.<|im_end|>"),
        ("GEMMA", "Two.<end_of_turn>Yes, två.<end_of_turn>"),
        ("MISTRAL", " Two.<eos> Yes, två.<eos>"),
    ],
)
@pytest.mark.parametrize("begins", ["<bos>", "", "[gMASK] <bos>"])
def test_the_assistant_alone_is_scored(tmp_path: Path, name: str, expected: str, begins: str) -> None:
    tokenizer = byte_tokenizer(getattr(templates, name), begins)
    found = built(source(tmp_path, TALK, TALK[:2]), tokenizer, score="assistant")
    end = expected.index("Yes") - (name == "MISTRAL")
    assert [scored(tokenizer, found, row) for row in (0, 1)] == [expected, expected[:end]]
    assert found.digest != built(source(tmp_path, TALK, TALK[:2]), tokenizer, pack=False).digest
    assert any("does not mark" in note for note in found.notes) == (name != "MARKED")


def test_turns_found_are_those_that_a_template_marks(tmp_path: Path) -> None:
    pair = (byte_tokenizer(each) for each in (templates.MARKED, templates.CHATML))
    marked, found = (built(source(tmp_path, [SYSTEM, *TALK], TALK), each, score="assistant") for each in pair)
    assert torch.equal(marked.input_ids, found.input_ids) and torch.equal(marked.scored, found.scored)
    assert marked.digest == found.digest


def test_positions_that_count_are_those_before_a_scored_token(tmp_path: Path) -> None:
    found = built(source(tmp_path, TALK, TALK[:2]), byte_tokenizer(templates.CHATML), score="assistant")
    counted = found.counted()
    assert counted is not None and not counted[:, -1].any()
    assert torch.equal(counted[:, :-1], found.scored[:, 1:] & found.attention_mask[:, 1:])
    assert [torch.equal(each, counted[i : i + 1]) for i, (_, _, each) in enumerate(found.batches(1))] == [True, True]


def test_no_token_that_a_sequence_begins_with_is_scored(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to cut into windows")
    text = make_source("text", {"path": str(tmp_path / "a.txt")})
    one, two = (built(text, byte_tokenizer(begins=begins), 8, score="all") for begins in ("<bos>", "[gMASK] <bos>"))
    assert one.scored is None, "the first token of a sequence is predicted from nothing"
    assert two.scored.tolist() == [[False] * 2 + [True] * 6] * len(two.input_ids)
    assert two.counted().tolist() == [[False] + [True] * 6 + [False]] * len(two.input_ids)
    assert two.digest != built(text, byte_tokenizer(begins="[gMASK] <bos>"), 8).digest
    assert one.digest == built(text, byte_tokenizer(), 8).digest


def test_packed_conversations_follow_one_another_as_the_template_ends_them(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(templates.LLAMA3)
    found = built(source(tmp_path, TALK[:2], TALK[:2]), tokenizer, 20)
    stream = tokenizer.apply_chat_template(TALK[:2], tokenize=False).removeprefix("<bos>") * 2
    assert "".join(words(tokenizer, found, i).removeprefix("<bos>") for i in range(len(found.input_ids))) in stream
    assert (found.input_ids == tokenizer.bos_token_id).sum(1).tolist() == [1] * len(found.input_ids)
    assert tokenizer.eos_token_id not in found.input_ids


@pytest.mark.parametrize("pack", [True, False])
def test_the_beginning_that_a_template_writes_is_not_scored(tmp_path: Path, pack: bool) -> None:
    tokenizer = byte_tokenizer(templates.CHATML.replace("{{'<|im", "{{ bos_token + '<|im"), begins="")
    found = built(source(tmp_path, TALK, TALK), tokenizer, 25 if pack else 999, pack=pack, score="all")
    assert torch.equal(found.scored, found.input_ids != tokenizer.bos_token_id) or not pack
    assert (found.input_ids == tokenizer.bos_token_id).sum() == 8
    assert not found.scored[found.input_ids == tokenizer.bos_token_id].any()
    assert built(source(tmp_path, {"text": "<bos>one<bos>two"}), tokenizer, 5, pack=pack, score="all").scored is None


def test_texts_and_conversations_in_one_file(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(templates.CHATML)
    made = source(tmp_path, {"text": "one"}, TALK[:2], {"text": None}, {"text": "two", "messages": 3})
    found = built(made, tokenizer, pack=False)
    chat = "<bos>" + tokenizer.apply_chat_template(TALK[:2], tokenize=False)
    assert [words(tokenizer, found, row) for row in range(3)] == ["<bos>one", chat, "<bos>two"]
    assert str(found.read) == f"3 sequences in the {found.tokens:,} tokens of all 3 documents, 1 blank left out"


def test_tools_and_calls_reach_the_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(templates.MISTRAL)
    messages = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    messages += [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "Two."}]
    expected = (
        '<bos>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
        '[/AVAILABLE_TOOLS][INST] One and one?[/INST][TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]<eos>'
        "[TOOL_RESULTS] 2[/TOOL_RESULTS] Two.<eos>"
    )
    for tools, turns in (([TOOL], messages), (json.dumps([TOOL]), json.dumps(messages))):
        found = built(source(tmp_path, {"messages": turns, "tools": tools}), tokenizer, score="assistant")
        assert words(tokenizer, found) == expected
        assert scored(tokenizer, found) == '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]<eos> Two.<eos>'


def test_parts_of_text_are_joined_and_null_keys_left_out(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "line"}]
    plain = [{"role": "user", "content": "One\nline"}, TALK[1]]
    rows = [{"role": "user", "content": parts, "tool_calls": None, "name": None}, TALK[1]]
    tokenizer = byte_tokenizer(templates.MISTRAL)
    found, expected = (built(source(tmp_path, each), tokenizer, pack=False).digest for each in (rows, plain))
    assert found == expected


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": []}, "line 2: a conversation without messages"),
        ({"messages": ["hi"]}, "line 2: message 1 is str, expected an object with role and content"),
        ({"messages": [TALK[0], {"from": "gpt", "value": "x"}]}, "message 2 has no role; its keys are: from, value"),
        ({"messages": [{"role": "user", "content": None}]}, "line 2: message 1 has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2: message 1: content is int, expected text"),
        (
            {"messages": [TALK[0], {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "line 2: message 2 has a part of type 'image_url': a language model takes text alone",
        ),
        ({"messages": TALK, "images": ["a.png"]}, "line 2: field 'images' beside the messages"),
        ({"messages": [TALK[0], {"role": "assistant", "tool_calls": "x"}]}, "message 2: tool_calls is no list of"),
        ({"messages": TALK, "tools": "["}, "line 2: field 'tools' is text, but not JSON"),
        ({"messages": TALK, "tools": ["add"]}, "line 2: field 'tools' is no list of JSON schemas"),
        ({"messages": "hello"}, "line 2: field 'messages' is text, but not JSON"),
        ({"messages": 3}, "line 2: field 'messages' is int, expected text or messages"),
        ({"text": {"a": 1}}, "line 2: field 'text' is dict, expected text or messages"),
        ({"prompt": "x"}, "line 2: no field 'text' or 'messages'; its fields are like: prompt"),
        ({"messages": [{"role": "user", "content": "cut \ud83d here"}]}, r"holds \\ud83d, half a surrogate"),
        (
            {"messages": TALK, "tools": [{"name": "\ud83d"}]},
            r"line 2: field 'messages' holds \\ud83d, half a surrogate",
        ),
        ({"messages": [SYSTEM, *TALK]}, "line 2: the chat template does not take it: System role not supported"),
        ({"messages": TALK[1:]}, "line 2: the chat template does not take it: Conversation roles must alternate"),
    ],
)
def test_mistakes_name_the_line(tmp_path: Path, row: dict[str, Any], match: str) -> None:
    with pytest.raises(CalibrationError, match=match) as error:
        built(source(tmp_path, TALK, row), byte_tokenizer(templates.GEMMA), 8)
    assert "chats.jsonl', line 2" in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_rendered_or_scored_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match="line 1: a conversation, but the model's tokenizer has no chat template"
    ):
        built(source(tmp_path, TALK), byte_tokenizer(), 8)
    with pytest.raises(CalibrationError, match=r"line 1: the chat template does not take it: .*nowhere"):
        built(source(tmp_path, TALK), byte_tokenizer("{{ nowhere.at_all }}"), 8)
    with pytest.raises(CalibrationError, match=r"writes what is before message 2 otherwise with it.*score=all"):
        built(source(tmp_path, TALK), byte_tokenizer("{{ messages | length }}" + templates.CHATML), score="assistant")
    chatml = byte_tokenizer(templates.CHATML)
    with pytest.raises(CalibrationError, match=r"takes conversations, and here is text: give rows with messages"):
        built(source(tmp_path, {"text": "one"}), chatml, score="assistant")
    with pytest.raises(CalibrationError, match="no answer of the assistant that begins within 20 tokens"):
        built(source(tmp_path, TALK, TALK[:1]), chatml, 20, score="assistant")


def test_an_answer_that_is_written_otherwise_later_has_a_sequence_of_its_own(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(templates.THINKING)
    found = built(source(tmp_path, TALK, TALK[:2]), tokenizer, score="assistant")
    thought = "<think>\n\n</think>\n\n"
    expected = [f"{thought}Two.<|im_end|>", f"{thought}Yes, två.<|im_end|>", f"{thought}Two.<|im_end|>"]
    assert [scored(tokenizer, found, row) for row in range(3)] == expected
    for row, turns in enumerate((2, 4, 2)):
        text = tokenizer.apply_chat_template(TALK[:turns], tokenize=False)
        assert words(tokenizer, found, row) == "<bos>" + text
    assert "each is in a sequence of its own" in found.notes[1]
    assert str(found.read).startswith("3 sequences in ") and "of all 2 documents" in str(found.read)


def test_a_thought_that_the_prompt_opens_and_the_answer_does_without(tmp_path: Path) -> None:
    opens = templates.CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}")
    found = built(source(tmp_path, TALK), byte_tokenizer(opens), score="assistant")
    assert scored(byte_tokenizer(), found) == "Two.<|im_end|>Yes, två.<|im_end|>"


def test_a_template_that_reads_parts_gets_them(tmp_path: Path) -> None:
    parts = templates.CHATML.replace("message['content']", "message['content'][0]['text']")
    silent = templates.CHATML.replace("message['content']", "(message['content'] | map(attribute='text') | join)")
    for template in (parts, silent):  # the one raises on a text, the other writes nothing of it
        found = built(source(tmp_path, TALK), byte_tokenizer(template), score="assistant")
        assert found.digest == built(source(tmp_path, TALK), byte_tokenizer(templates.CHATML), score="assistant").digest


def test_what_a_template_does_not_write_is_a_note(tmp_path: Path) -> None:
    row = {"messages": [TALK[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [TOOL]}
    found = built(source(tmp_path, row), byte_tokenizer(templates.CHATML), pack=False)
    left = "the chat template knows no {}: what the conversations hold of them is left out"
    assert found.notes == (left.format("tool_calls"), left.format("tools"))


def test_what_is_cut_or_left_out_is_a_note(tmp_path: Path) -> None:
    found = built(source(tmp_path, TALK, TALK[:1], TALK[:2]), byte_tokenizer(templates.CHATML), 70, score="assistant")
    assert len(found.input_ids) == 2
    assert found.notes[1:] == (
        "documents longer than 70 tokens, of which the rest is cut: 1 of 2",
        "documents left out, which hold no answer of the assistant that begins within 70 tokens: 1",
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch ' + messages[0]['content']) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/hostname' %}",
        "{{ messages.__class__.__base__ }}{% set x = messages.append(1) %}",
    ],
)
def test_a_template_reaches_nothing_outside(tmp_path: Path, template: str) -> None:
    made = source(tmp_path, [{"role": "user", "content": str(tmp_path / "reached")}])
    with pytest.raises(CalibrationError, match="line 1: the chat template does not take it: "):
        built(made, byte_tokenizer(template), pack=False)
    assert not (tmp_path / "reached").exists()


def test_a_template_that_writes_the_date_writes_the_same_every_day(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(templates.DATED)
    found = built(source(tmp_path, TALK), tokenizer, pack=False)
    assert words(tokenizer, found).startswith("<bos>Today is 26 July 2024.\n<|im_start|>user\nOne")
    assert found.notes == ("the chat template writes the date of the day: it is 26 Jul 2024 in every sample",)


def test_a_field_of_another_name(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(templates.CHATML)
    expected = built(source(tmp_path, TALK), tokenizer, pack=False).digest
    for value in (TALK, json.dumps(TALK)):
        path = source(tmp_path, {"talk": value, "text": "x"}).options.path
        assert built(make_source("jsonl", {"path": path, "field": "talk"}), tokenizer, pack=False).digest == expected
    path = source(tmp_path, {"talk": "[1] is no conversation", "messages": TALK}).options.path
    found = built(make_source("jsonl", {"path": path, "field": "talk"}), tokenizer, pack=False)
    assert words(tokenizer, found) == "<bos>[1] is no conversation"


def test_every_source_gives_the_same_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = byte_tokenizer(templates.MISTRAL)
    calls = [TALK[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, TALK[1]]
    rows = [{"messages": TALK, "tools": None}, {"messages": calls, "tools": [TOOL]}]
    lines = source(tmp_path, *rows)
    expected = [built(lines, tokenizer, 20, pack=pack).digest for pack in (True, False)]
    packed = tmp_path / "data" / "train.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(Path(lines.options.path).read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "structs.parquet")
    texts = [{key: value and json.dumps(value) for key, value in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "texts.parquet")
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "many")
    sources = [
        ("jsonl", packed), ("jsonl", packed.parent), ("parquet", tmp_path / "structs.parquet"),
        ("parquet", tmp_path / "texts.parquet"), ("datasets", packed.parent), ("datasets", tmp_path / "one"),
        ("datasets", tmp_path / "many"),
    ]  # fmt: skip
    for name, path in sources:
        made = make_source(name, {"path": str(path)})
        made.check()
        assert [built(made, tokenizer, 20, pack=pack).digest for pack in (True, False)] == expected, (name, path)


def test_media_beside_conversations_in_a_table(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": TALK, "images": [b"png"]}]), tmp_path / "a.parquet")
    made = make_source("parquet", {"path": str(tmp_path / "a.parquet")})
    with pytest.raises(CalibrationError, match=r"a\.parquet', row 1: field 'images' beside the messages"):
        built(made, byte_tokenizer(templates.CHATML), 8)


KEYS = ["role", "content", "tool_calls", "type", "text", "function", "arguments", "name"]
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*KEYS, "user", "assistant", '{"a": 1}'])
)
VALUES = st.recursive(
    LEAVES | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
MESSAGES = VALUES | st.lists(VALUES | st.fixed_dictionaries({"role": ROLES, "content": VALUES}), max_size=4)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES, tools=VALUES, template=st.sampled_from(["CHATML", "MISTRAL", "MARKED", "THINKING"]))
def test_any_row_is_read_or_refused(tmp_path: Path, messages: Any, tools: Any, template: str) -> None:
    made, tokenizer = source(tmp_path, {"messages": messages, "tools": tools}), byte_tokenizer(None)
    tokenizer.chat_template = getattr(templates, template)
    for options in ({"pack": False}, {"score": "assistant"}):
        try:
            built(made, tokenizer, **options)
        except CalibrationError as error:
            assert "\n" not in str(error)
