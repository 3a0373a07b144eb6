"""The data of a run: tokenised, cut, counted; everything that is wrong with it is said before a model is loaded."""

import json

import pytest

from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.chat.masking import IGNORED
from nf4lora.train.data import hold_out, prepare_data, read, show
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.samples.rows import Table

from support.models import tiny_tokenizer


def chat(question="Hi?", answer="Hello."):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def file_of(tmp_path, *rows, name="d.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(path, *arguments, tokenizer=None):
    config = parse_arguments(["--model", "m", "--data", path, *arguments])
    train, held_out, notes = read(config)
    data = prepare_data(config, tokenizer or tiny_tokenizer(), (train, held_out), [])
    data.notes[:0] = notes
    return data


def test_answers_are_trained_where_the_data_has_roles(tmp_path):
    data = prepared(file_of(tmp_path, chat()))
    assert data.answers_only
    assert show(data.train, tiny_tokenizer())[-2] == ("Hello.<|im_end|>", True)
    assert 0 < data.train.trained < data.train.tokens


def test_all_tokens_are_trained_in_text_or_if_asked(tmp_path):
    for data in (
        prepared(file_of(tmp_path, {"text": "abc"})),
        prepared(file_of(tmp_path, chat()), "--assistant_only_loss", "false"),
    ):
        assert not data.answers_only
        assert data.train.trained == data.train.tokens - 1  # the first token is predicted from nothing


def test_answers_only_needs_roles(tmp_path):
    with pytest.raises(UsageError, match="needs data with roles"):
        prepared(file_of(tmp_path, {"text": "abc"}), "--assistant_only_loss", "true")


def test_long_rows_are_cut_and_counted(tmp_path):
    data = prepared(file_of(tmp_path, chat(answer="x" * 100), chat()), "--max_length", "64")
    assert [len(row) for row in data.train.input_ids] == [64, len(data.train.input_ids[1])]
    assert any("1 of 2 rows" in note and "cut to 64" in note for note in data.notes)


def test_rows_of_which_nothing_is_left_are_dropped_and_named(tmp_path):
    data = prepared(file_of(tmp_path, chat(), chat(question="x" * 100)), "--max_length", "64")
    assert len(data.train.input_ids) == 1
    assert any("1 of 2 rows have nothing to train" in note and "line 2" in note for note in data.notes)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([chat(question="x" * 100)], "no token would be trained in any of 1 rows.*behind max_length 64"),
        ([{"messages": [{"role": "user", "content": "Hi?"}]}], "no token would be trained.*no answer"),
        ([chat(), {"messages": [{"role": "bot", "content": "x"}]}], "line 2: .*role must be one of"),
        ([chat(), {"text": "x"}], "line 2: messages must be a list"),
        ([{"question": "x"}], "line 1 has no usable field"),
    ],
)
def test_data_that_cannot_be_trained_on_is_an_error(tmp_path, rows, words):
    with pytest.raises(RunError, match=words):
        prepared(file_of(tmp_path, *rows), "--max_length", "64")


def test_rows_that_cannot_be_used_are_all_counted_or_left_out(tmp_path):
    rows = [chat(), {"text": "x"}, chat(), {"messages": [{"role": "bot", "content": "x"}]}, chat()]
    path = file_of(tmp_path, *rows)
    with pytest.raises(RunError, match=r"2 of 5 rows cannot be used:\s.*line 2: .*\s.*line 4: .*role must be"):
        prepared(path)
    data = prepared(path, "--skip_bad_rows")
    assert len(data.train.input_ids) == 3
    assert any("2 of 5 rows" in note and "left out" in note and "line 2" in note for note in data.notes)
    with open(path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(RunError, match="3 of 6 rows cannot be used"):
        prepared(path)
    assert any("3 of 6 rows" in note for note in prepared(path, "--skip_bad_rows").notes)
    parts = hold_out(Table("d", [{"i": i} for i in range(4)], range(4), bad=["line 9"]), 1, seed=1)
    assert [part.bad for part in parts] == [["line 9"], []]  # counted once
    with pytest.raises(RunError, match="cannot be used"):
        prepared(file_of(tmp_path, {"messages": 3}, {"messages": 4}), "--skip_bad_rows")


def test_rows_that_the_template_refuses_are_counted_too(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + (
        tokenizer.chat_template
    )
    long = {"messages": chat()["messages"] * 2}
    path = file_of(tmp_path, long, chat(), long)
    with pytest.raises(RunError, match=r"2 of 3 rows cannot be used:\s.*line 1: .*too long.*\s.*line 3"):
        prepared(path, tokenizer=tokenizer)
    assert len(prepared(path, "--skip_bad_rows", tokenizer=tokenizer).train.input_ids) == 1


def test_tokenising_says_how_far_it_is(tmp_path):
    config = parse_arguments(["--model", "m", "--data", file_of(tmp_path, *[chat()] * 3)])
    said = []
    prepare_data(config, tiny_tokenizer(), read(config)[:2], [], said.append)
    assert said[0].endswith("d.jsonl: 0 of 3 rows")


def test_row_whose_answer_the_template_hides_is_named(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(RunError, match=r"line 2: message 1 .*generation.*assistant_only_loss false"):
        prepared(file_of(tmp_path, chat("A", "B"), chat()), tokenizer=tokenizer)


def test_evaluation_rows_come_from_file_directory_or_share(tmp_path):
    train, valid = file_of(tmp_path, *[chat(str(i)) for i in range(10)], name="train.jsonl"), chat("held out")
    other = file_of(tmp_path, valid, name="valid.jsonl")
    for arguments in ([train, "--eval_file", other], [str(tmp_path)]):
        data = prepared(*arguments)
        assert (len(data.train.input_ids), len(data.eval.input_ids)) == (10, 1)
    for size, rows in (("0.2", 2), ("3", 3)):
        data = prepared(train, "--val_size", size)
        assert (len(data.train.input_ids), len(data.eval.input_ids)) == (10 - rows, rows)


def test_held_out_rows_depend_on_the_seed_only():
    table = Table("d", [{"i": i} for i in range(20)], range(1, 21))
    train, held_out = hold_out(table, 5, seed=1)
    assert sorted(row["i"] for row in [*train.rows, *held_out.rows]) == list(range(20))
    assert hold_out(table, 5, seed=1)[1].rows == held_out.rows != hold_out(table, 5, seed=2)[1].rows
    assert held_out.where(0) == f"d: row {held_out.rows[0]['i'] + 1}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--val_size", "10"], "would hold out 10 of 10 rows"),
        (["--val_size", "0.01"], "would hold out 0 of 10"),
        (["--eval_steps", "5"], "need evaluation rows"),
        (["--eval_strategy", "epoch"], "need evaluation rows"),
        (["--dataset_config", "small"], "is for data sets on the Hub"),
    ],
)
def test_evaluation_that_cannot_be_is_a_usage_error(tmp_path, arguments, words):
    with pytest.raises(UsageError, match=words):
        prepared(file_of(tmp_path, *[chat(str(i)) for i in range(10)]), *arguments)


@pytest.mark.parametrize("path", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all"])
def test_path_that_is_not_there_is_not_taken_for_a_hub_id(path):
    with pytest.raises(UsageError, match="no such file or directory"):
        prepared(path)


def test_directory_with_evaluation_rows_and_a_share_contradict(tmp_path):
    for name in ("train.jsonl", "valid.jsonl"):
        file_of(tmp_path, chat(), name=name)
    with pytest.raises(UsageError, match="holds evaluation rows already"):
        prepared(str(tmp_path), "--val_size", "0.5")


def test_ambiguity_and_installed_template_are_noted(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    data = prepared(file_of(tmp_path, {**chat(), "text": "abc"}), tokenizer=tokenizer)
    assert "messages or text" in data.choice
    assert "ChatML was installed" in data.notes[0]


def test_dataset_holds_tokens_and_labels(tmp_path):
    row = prepared(file_of(tmp_path, chat())).train.dataset()[0]
    assert set(row) == {"input_ids", "labels"}
    assert row["labels"][0] == IGNORED
    assert len(row["labels"]) == len(row["input_ids"])


def test_rows_nested_too_deeply_are_left_out_like_other_bad_rows(tmp_path):
    deep = 1
    for _ in range(200):
        deep = {"a": deep}
    bad = {"messages": [{**turn, "meta": deep} for turn in chat()["messages"]]}
    data = prepared(file_of(tmp_path, chat(), bad), "--skip_bad_rows")
    assert len(data.train.input_ids) == 1
    assert any("1 of 2 rows" in note and "nested more than 100 deep" in note for note in data.notes)


def test_empty_cells_are_bad_rows(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("instruction,output\nsay a,a\nsay b,\n")
    with pytest.raises(RunError, match=r"line 3: output must not be empty.*\n.*--skip_bad_rows"):
        prepared(str(path))
    assert len(prepared(str(path), "--skip_bad_rows").train.input_ids) == 1
