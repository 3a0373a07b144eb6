"""Tool calls and keys of turns: what the row says is what is trained, whichever file and form it came in."""

import json

import pytest

from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.chat.masking import IGNORED, Encoder
from nf4lora.train.data import prepare_data, read
from nf4lora.train.errors import RunError
from nf4lora.train.samples.formats import sample_of
from nf4lora.train.samples.tools import calls, schemas

from support.chat_templates import CALLING, GPT_OSS, TEMPLATES, tokenizer_with
from support.models import tiny_tokenizer

ARGUMENTS = {"city": "Zürich", "days": [1, 2], "unit": {"name": "C"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def conversation(call, **more):
    return {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "", **call},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "No."},
        ],
        **more,
    }


def called(arguments):
    return {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]}


def encoded(row, template, answers_only=True):
    return Encoder(tokenizer_with(template), answers_only)(sample_of(row, "messages"))


def trained(encode, row):
    """The trained pieces of a row, as text."""
    pieces, before = [], False
    for token, label in zip(*encode(sample_of(row, "messages")), strict=True):
        if label != IGNORED:
            pieces += [] if before else [[]]
            pieces[-1].append(token)
        before = label != IGNORED
    return [encode.tokenizer.decode(piece) for piece in pieces]


FORMS = {
    "JSON string": called(json.dumps(ARGUMENTS)),
    "compact JSON string": called(json.dumps(ARGUMENTS, separators=(",", ":"))),
    "call without a frame": {"tool_calls": [{"name": "weather", "arguments": ARGUMENTS}]},
    "call without a type": {"tool_calls": [{"function": {"name": "weather", "arguments": ARGUMENTS}}]},
    "list in a string": {"tool_calls": json.dumps(called(ARGUMENTS)["tool_calls"])},
    "one call, not a list": {"tool_calls": called(ARGUMENTS)["tool_calls"][0]},
    "the older function_call": {"function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
    "nulls": called({**ARGUMENTS, "hours": None, "unit": {"name": "C", "long": None}}),
    "null content": {**called(ARGUMENTS), "content": None},
}


@pytest.mark.parametrize("template", CALLING)
@pytest.mark.parametrize("form", FORMS)
def test_call_has_the_same_tokens_in_every_form(template, form):
    assert encoded(conversation(FORMS[form]), TEMPLATES[template]) == encoded(
        conversation(called(ARGUMENTS)), TEMPLATES[template]
    )


@pytest.mark.parametrize("template", CALLING)
def test_arguments_are_trained_as_json_and_not_as_a_string_of_json(template):
    text = tiny_tokenizer().decode(encoded(conversation(called(json.dumps(ARGUMENTS))), TEMPLATES[template])[0])
    assert "Zürich" in text
    assert r"\"city\"" not in text
    assert "'city'" not in text


def test_template_that_prints_arguments_gets_them_as_text():
    # without a filter a dict is printed as Python writes it, which no parser of JSON takes
    prints = (
        "{% for m in messages %}{{ '<|U|>' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    )
    text = tiny_tokenizer().decode(encoded(conversation(called({"a": 1})), prints)[0])
    assert 'weather{"a": 1}' in text


def test_arguments_that_are_no_json_are_trained_as_they_stand():
    assert 'weather", "arguments": {"a": ' in trained(
        Encoder(tokenizer_with(TEMPLATES["qwen3"]), True), conversation(called('{"a": '))
    )[0]  # fmt: skip
    assert calls([{"name": "f", "arguments": "[1]"}], "x")[0]["function"]["arguments"] == "[1]"


def test_schemas_are_the_same_as_objects_as_strings_and_with_nulls():
    filled = json.loads(json.dumps(TOOL))
    filled["function"]["parameters"]["properties"]["city"] |= {"enum": None, "default": None}
    textual = json.loads(json.dumps(TOOL))
    textual["function"]["parameters"] = json.dumps(TOOL["function"]["parameters"])
    for form in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], [filled], [textual]):
        assert schemas(form) == [TOOL]
    assert schemas(None) is schemas([]) is schemas("") is None
    assert schemas([{"enum": ["a", None]}]) == [{"enum": ["a", None]}]  # a null in a list has its place


def prepared(path, *arguments, template):
    config = parse_arguments(["--model", "m", "--data", str(path), *arguments])
    train, held_out, notes = read(config)
    data = prepare_data(config, tokenizer_with(template), (train, held_out), [])
    data.notes[:0] = notes
    return data


ROWS = [
    conversation(called({"city": "Bern"}), tools=[TOOL]),
    conversation({"tool_calls": [{"function": {"name": "time", "arguments": {"zone": "CET", "exact": True}}}]}),
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "weight": 1}]},
    conversation(called({}), tools=[{"type": "function", "function": {"name": "time", "description": "Now."}}]),
]


def rows_as(form, folder):
    path = folder / f"train.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "json":
        path.write_text(json.dumps({name: [row.get(name) for row in ROWS] for name in ("messages", "tools")}))
    elif form == "csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["messages", "tools"], delimiter=";")
            writer.writeheader()
            writer.writerows({name: json.dumps(value) for name, value in row.items()} for row in ROWS)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("form", ["parquet", "json", "csv"])
@pytest.mark.parametrize("template", ["chatml tools", "glm", "qwen3"])
def test_rows_have_the_same_tokens_from_every_kind_of_file(tmp_path, form, template):
    data = [prepared(rows_as(each, tmp_path), template=TEMPLATES[template]) for each in ("jsonl", form)]
    for one, other in zip(data[0].train.input_ids, data[1].train.input_ids, strict=True):
        assert one.tolist() == other.tolist()
    assert data[0].train.fingerprint() == data[1].train.fingerprint()
    assert data[0].train.fingerprint()["rows"] == len(ROWS)


def test_fingerprint_changes_with_tokens_labels_and_order(tmp_path):
    def print_of(*rows, arguments=()):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepared(path, *arguments, template=TEMPLATES["chatml"]).train.fingerprint()["sha256"]

    a, b = ({"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": x}]} for x in "ab")
    prints = [print_of(a, b), print_of(b, a), print_of(a), print_of(a, b, arguments=["--assistant_only_loss", "false"])]
    assert len(set(prints)) == len(prints)
    assert print_of(a, b) == prints[0]


def test_nulls_that_somebody_wrote_are_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(conversation(called('{"city": null, "days": 1}'))) + "\n")
    assert any("1 keys of tools and tool calls are null" in note
               for note in prepared(path, template=TEMPLATES["qwen3"]).notes)  # fmt: skip


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_mask", "loss_weight", "trainable"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_answer_that_its_row_takes_out_is_not_trained(key, off):
    row = {
        "messages": [
            {"role": "user", "content": "a", key: off},
            {"role": "assistant", "content": "bad", key: off},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "good", key: True},
        ]
    }
    assert trained(Encoder(tokenizer_with(TEMPLATES["chatml"]), True), row) == ["good<|im_end|>"]
    everything = trained(Encoder(tokenizer_with(TEMPLATES["chatml"]), False), row)
    assert "bad" not in "".join(everything)
    assert "good" in "".join(everything)
    plain = {"messages": [{"role": each["role"], "content": each["content"]} for each in row["messages"]]}
    ids = [Encoder(tokenizer_with(TEMPLATES["chatml"]), True)(sample_of(each, "messages"))[0] for each in (row, plain)]
    assert ids[0] == ids[1]


def test_weights_of_sharegpt_and_of_a_last_answer_count_too():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"},
             {"from": "gpt", "value": "d", "weight": 0}]  # fmt: skip
    encode = Encoder(tokenizer_with(TEMPLATES["chatml"]), True)
    ids, labels = encode(sample_of({"conversations": turns}, "sharegpt"))
    assert tiny_tokenizer().decode([label for label in labels if label != IGNORED]) == "b<|im_end|>"
    assert len(ids) == len(labels)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"weight": 0.5}, "weight must be 0 or 1"),
        ({"weight": "0"}, "weight must be 0 or 1"),
        ({"loss_mask": [0, 1]}, "loss_mask must be 0 or 1"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail cannot be honoured"),
        ({"mask": True}, "mask cannot be honoured"),
    ],
)
def test_key_of_a_turn_that_cannot_be_honoured_is_named(row, words):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **row}]
    with pytest.raises(ValueError, match=rf"messages\[1\]: {words}"):
        sample_of({"messages": messages}, "messages")


def test_turn_of_the_user_cannot_be_trained():
    messages = [{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=r"messages\[0\]: train asks to train a turn of user"):
        sample_of({"messages": messages}, "messages")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"weight": 0.5}, "weight must be 1"),
        ({"train": False}, "train must be 1"),
        ({"loss_mask": [1, 0]}, "loss_mask cannot be honoured"),
        ({"images": ["a.png"]}, "images cannot be honoured: only text"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs must be an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "must not hold tokenize"),
    ],
)
def test_column_that_cannot_be_honoured_is_named(row, words):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match=words):
        sample_of({"messages": messages, **row}, "messages")


def test_columns_that_mean_nothing_here_are_listed(tmp_path):
    path = tmp_path / "d.jsonl"
    row = {"messages": ROWS[2]["messages"], "id": 7, "source": "x", "images": [], "weight": 1}
    path.write_text(json.dumps(row) + "\n")
    assert any(note.endswith("not used: id, source") for note in prepared(path, template=TEMPLATES["chatml"]).notes)


def test_system_column_and_template_options_of_a_row_are_used():
    row = {"messages": ROWS[2]["messages"], "system": "Be kind.", "chat_template_kwargs": {"enable_thinking": False}}
    text = tiny_tokenizer().decode(encoded(row, TEMPLATES["smollm3"])[0])
    assert "Reasoning: off\nBe kind." in text
    with pytest.raises(ValueError, match="both give instructions"):
        sample_of({"messages": [{"role": "system", "content": "x"}, *ROWS[2]["messages"]], "system": "y"}, "messages")
    for kind, plain in (("text", {"text": "a"}), ("prompt_completion", {"prompt": "a", "completion": "b"})):
        with pytest.raises(ValueError, match="system has no place"):
            sample_of({**plain, "system": "Be kind."}, kind)


def test_reasoning_goes_under_the_name_that_the_template_reads():
    row = {"messages": [{"role": "user", "content": "a"},
                        {"role": "assistant", "content": "b", "reasoning_content": "because"}]}  # fmt: skip
    assert "analysis<|message|>because<|end|>" in "".join(trained(Encoder(tokenizer_with(GPT_OSS), True), row))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "input": 3, "output": "b"}, "input must be text .*got int 3"),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, "input must be text .*got float nan"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "input must be text .*got list"),
        ({"instruction": "a", "output": None}, "output must be text, got NoneType"),
        ({"instruction": "a", "output": "b", "system": 3}, "system must be text"),
        ({"instruction": "a", "output": "b", "history": 3}, "history must be a list of"),
        ({"instruction": "a", "output": "b", "history": [["q", None]]}, r"history\[0\] must be text"),
        ({"instruction": "a", "output": "b", "history": "[broken"}, "not valid JSON"),
        ({"text": 3.5}, "text must be text that is not empty, got float 3.5"),
        ({"text": "half \ud83d"}, r"lone surrogate \\ud83d"),
        ({"text": b"bytes"}, "text must be text that is not empty, got bytes"),
        ({"prompt": "a", "completion": None}, "both be text"),
        ({"prompt": ["a"], "completion": ["b"]}, "must be an object with role and content"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "role must be one of"),
        ({"messages": [{"role": "user", "content": None}]}, "has no content"),
        ({"messages": [{"role": "user", "content": b"a"}]}, "content must be text, got bytes"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type image_url"),
        ({"messages": [3]}, "must be an object"),
        ({"messages": "[" * 100_000 + "]" * 100_000}, "nested too deeply"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "from must be one of"),
        ({"conversations": [{"from": "human", "value": None}]}, "value must be text, got NoneType"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "function_call must be JSON"),
        (conversation(called({"x": b"raw"})), "must hold JSON values, got bytes"),
        (conversation(called({"x": float("nan")})), "must hold finite numbers"),
        (conversation({"tool_calls": [3]}), r"tool_calls\[0\] must be an object like"),
        (conversation({"tool_calls": "f(x)"}), "tool_calls must be a list of tool calls"),
        (conversation(called({}), tools=3), "tools must be a list"),
        (conversation(called({}), tools=["weather"]), r"tools\[0\] must be an object"),
        (conversation(called({}), tools="{broken"), "not valid JSON"),
    ],
)
def test_value_that_does_not_fit_is_named_with_its_line(tmp_path, row, words):
    from nf4lora.train.samples.formats import recognise, samples
    from nf4lora.train.samples.rows import Table

    good = {name: "fine" for name in row} if not {"messages", "conversations"} & set(row) else row
    table = Table("d.jsonl", [good, row], [1, 2], "line")
    kind, _ = recognise(table)
    with pytest.raises(RunError, match=rf"d\.jsonl: line 2: .*{words}"):
        samples(table, kind)
