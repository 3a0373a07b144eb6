"""Rows to samples: the format is recognised, and a row that does not fit is named."""

import json

import pytest

from nf4lora.train.errors import RunError
from nf4lora.train.samples.formats import convert, recognise, samples
from nf4lora.train.samples.rows import Table

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def nested(depth):
    return {"a": nested(depth - 1)} if depth else 1


def table(*rows):
    return Table("d.jsonl", list(rows), range(1, len(rows) + 1), "line")


def converted(row, wanted="auto"):
    kind, _ = recognise(table(row), wanted)
    return kind, samples(table(row), kind)[0]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": TURNS}, "messages"),
        ({"messages": json.dumps(TURNS)}, "messages"),
        ({"conversations": TURNS}, "messages"),
        ({"messages": {"role": ["user", "assistant"], "content": ["hi", "ho"]}}, "messages"),
        ({"conversations": {"from": ["human", "gpt"], "value": ["hi", "ho"]}}, "sharegpt"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, "sharegpt"),
        ({"instruction": "hi", "output": "ho"}, "alpaca"),
        ({"instruction": "hi", "input": "", "output": "ho"}, "alpaca"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt_completion"),
    ],
)
def test_chat_formats_give_the_same_conversation(row, kind):
    found, sample = converted(row)
    assert found == kind
    assert sample.messages == TURNS


SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
OTHER = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "column"}]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"conversations": SHARED}, "messages"),
        ({"messages": SHARED}, "messages"),
        ({"messages": SHARED}, "auto"),
        ({"conversations": TURNS}, "sharegpt"),
        ({"conversations": TURNS, "messages": OTHER}, "sharegpt"),
        ({"conversations": OTHER, "messages": SHARED}, "messages"),
        ({"messages": [{"role": "user", "value": "hi"}, {"from": "gpt", "content": "ho"}]}, "messages"),
        ({"messages": [{"from": None, "value": None, **turn} for turn in TURNS]}, "messages"),
    ],
)
def test_turns_are_read_under_the_names_they_have_in_the_column_that_is_named(row, wanted):
    assert converted(row, wanted)[1].messages == TURNS


def test_the_column_that_is_not_read_is_named():
    rows = table({"messages": TURNS, "conversations": SHARED, "id": 1}, {"messages": TURNS})
    assert convert(rows, "messages").unused == ["conversations", "id"]
    assert convert(rows, "sharegpt").unused == ["id", "messages"]
    assert convert(table({"messages": TURNS}, {"messages": None, "conversations": SHARED}), "messages").unused == []


def test_text_and_prompt_keep_their_text():
    assert converted({"text": "abc"})[1].text == "abc"
    kind, sample = converted({"prompt": "a", "completion": "b"})
    assert (kind, sample.prompt, sample.text) == ("prompt_completion", "a", "b")


def test_alpaca_takes_input_system_and_history():
    row = {"instruction": "do", "input": "this", "output": "done", "system": "s", "history": [["q", "a"]]}
    assert [(m["role"], m["content"]) for m in converted(row)[1].messages] == [
        ("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "do\nthis"), ("assistant", "done")
    ]  # fmt: skip


def test_sharegpt_takes_system_tools_and_function_calls():
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "it is 3"},
    ]
    sample = converted({"conversations": turns, "system": "s", "tools": '[{"type": "function"}]'})[1]
    assert [m["role"] for m in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert sample.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert sample.tools == [{"type": "function"}]


def test_answers_in_the_prompt_are_not_trained():
    row = {"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]}
    assert converted(row)[1].trained_from == 3


def test_ambiguous_rows_are_decided_aloud():
    kind, why = recognise(table({"messages": TURNS, "text": "hi ho"}))
    assert kind == "messages"
    assert "messages or text" in why
    assert recognise(table({"messages": TURNS, "text": "hi ho"}), "text") == ("text", "")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a"}, "line 1 has no usable field: .*it has question"),
        ({}, "it has nothing"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\]: role must be one of .*got 'bot'"),
        ({"messages": []}, "not empty"),
        ({"messages": "hello"}, "list of messages"),
        ({"messages": "[broken"}, "not valid JSON"),
        ({"messages": [{"role": "user"}]}, "has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "images"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "from must be one of human.*got 'robot'"),
        ({"conversations": [{"from": "human", "value": 1}]}, "value must be text"),
        ({"instruction": "a", "output": 3}, "output must be text"),
        ({"prompt": "a", "completion": 3}, "both be text"),
        ({"text": ""}, "text must be text that is not empty"),
        ({"text": " \n"}, "text must be text that is not empty"),
        ({"instruction": "a", "output": ""}, "output must not be empty"),
        ({"instruction": "a", "output": "b", "history": [["q", ""]]}, r"message 1 \(assistant\) must not be empty"),
        ({"prompt": "a", "completion": " "}, "completion must not be empty"),
        ({"prompt": TURNS[:1], "completion": [{"role": "assistant", "content": ""}]}, "message 1 .* not be empty"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "\n"}]}, "message 1 .* not be empty"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": []}]}, "message 1 .* not be empty"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
            "message 1 .* not be empty",
        ),
        ({"messages": [{**TURNS[0], "meta": nested(200)}, TURNS[1]]}, "must not be nested more than 100 deep"),
    ],
)
def test_row_that_does_not_fit_is_named(row, words):
    with pytest.raises(RunError, match=words):
        converted(row)


SILENT = {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [TURNS[0], {**SILENT, "weight": 0}, *TURNS]},
        {"messages": [TURNS[0], {**SILENT, "reasoning_content": "hm"}]},
        {"messages": [TURNS[0], {**SILENT, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
        {"prompt": [TURNS[0], SILENT, TURNS[0]], "completion": TURNS[1:]},
        {"messages": [{"role": "user", "content": ""}, TURNS[1]]},
    ],
)
def test_what_may_be_empty_is_what_is_not_learned(row):
    assert converted(row)[1].messages


def test_later_row_is_named_by_its_line():
    rows = table({"text": "a"}, {"text": None})
    with pytest.raises(RunError, match=r"d\.jsonl: line 2: text must be"):
        samples(rows, recognise(rows)[0])


def test_format_that_was_asked_for_must_be_there():
    with pytest.raises(RunError, match="no instruction and output, which the format alpaca needs; it has text"):
        recognise(table({"text": "a"}), "alpaca")


def test_text_parts_are_joined_and_nulls_dropped():
    turn = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}
    assert converted({"messages": [turn, TURNS[1]]})[1].messages[0] == {"role": "user", "content": "ab"}
