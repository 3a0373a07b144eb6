"""Files to rows: each format is read, each defect is named with its line or row."""

import json

import pytest

from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.samples.folders import read_directory
from nf4lora.train.samples.rows import read_file, read_hub

ROWS = [{"text": "one"}, {"text": "zwei ä"}]


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl", "\ufeff" + lines(ROWS)),
        ("a.jsonl", lines(ROWS).rstrip() + "\n\n\n"),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", lines(ROWS)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", json.dumps(ROWS, indent=2)),
        ("a.csv", "text\none\nzwei ä\n"),
        ("a.csv", '\ufefftext\r\n"one"\r\nzwei ä\r\n'),
        ("a.txt", "one\n\nzwei ä"),
        ("a.csv", "id;text\n1;one\n2;zwei ä\n"),
        ("a.csv", "id\ttext\n1\tone\n2\tzwei ä\n"),
        ("a.csv", "\ufeffsep=;\r\nid;text\r\n1;one\r\n2;zwei ä\r\n"),
        ("a.tsv", "text\tid\none\t1\nzwei ä\t2\n"),
        ("a.json", json.dumps({"text": ["one", "zwei ä"]})),
        ("a.json", json.dumps({"text": {"0": "one", "1": "zwei ä"}})),
        ("a.json", json.dumps({"columns": ["text"], "index": [0, 1], "data": [["one"], ["zwei ä"]]})),
        ("a.json", json.dumps({"rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]})),
        ("a.json", json.dumps({"version": 1, "train": ROWS})),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, content):
    rows = read_file(written(tmp_path / name, content)).rows
    assert [{"text": row["text"]} for row in rows] == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}], "tools": []},
        {"text": "a"},
    ],
)
def test_json_file_of_one_row_is_one_row(tmp_path, row):
    assert list(read_file(written(tmp_path / "a.json", json.dumps(row))).rows) == [row]


def test_columns_of_conversations_become_rows(tmp_path):
    one, two = ([{"role": "user", "content": each}] for each in "ab")
    table = read_file(written(tmp_path / "a.json", json.dumps({"messages": [one, two], "id": [1, 2]})))
    assert list(table.rows) == [{"messages": one, "id": 1}, {"messages": two, "id": 2}]
    assert table.note == "read by columns"


def test_comma_stays_where_the_header_has_one_column(tmp_path):
    table = read_file(written(tmp_path / "a.csv", 'text\n"a;b"\nc;d\n'))
    assert [row["text"] for row in table.rows] == ["a;b", "c;d"]
    assert table.note == ""


def test_line_numbers_count_the_line_that_names_the_separator(tmp_path):
    table = read_file(written(tmp_path / "a.csv", "sep=;\nid;text\n1;one\n"))
    assert table.where(0).endswith("line 3")


def test_all_bad_lines_are_counted_and_the_first_are_shown(tmp_path):
    content = "".join('{"text": "a"}\n' if i % 2 else "{broken\n" for i in range(20))
    with pytest.raises(RunError) as error:
        read_file(written(tmp_path / "a.jsonl", content))
    said = str(error.value)
    assert said.startswith("10 of 20 rows cannot be used:")
    assert "line 1 " in said
    assert "line 9 " in said
    assert "line 11 " not in said
    assert "and 5 more" in said
    assert "--skip_bad_rows trains on the other 10 rows" in said
    table = read_file(tmp_path / "a.jsonl", skip_bad=True)
    assert (len(table.rows), len(table.bad), table.where(0)) == (10, 10, f"{tmp_path / 'a.jsonl'}: line 2")
    with pytest.raises(RunError, match="2 of 2 rows cannot be used"):
        read_file(written(tmp_path / "b.jsonl", "{\n{\n"), skip_bad=True)


def test_parquet_gives_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet").rows) == ROWS


def test_csv_keeps_line_breaks_in_quotes_and_counts_lines(tmp_path):
    table = read_file(written(tmp_path / "a.csv", 'prompt,completion\n"a\nb",c\nd,e\n'))
    assert table.rows[0]["prompt"] == "a\nb"
    assert table.where(1).endswith("line 4")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', "line 3 is not valid JSON .*column 10"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2 must be an object"),
        ("a.json", '[{"text": "a"},\n{"text": "b",}]', "line 2 is not valid JSON"),
        ("a.json", '[{"text": "a"}, 3]', "row 2 must be an object"),
        ("a.json", '"text"', "list of objects"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, the header has 2"),
        ("a.csv", "a,b\n1\n", "line 2 has 1 fields, the header has 2"),
        ("a.csv", 'a,b\n"1,2\n', "not valid CSV"),
        ("a.csv", "a,a\n1,2\n", "column twice"),
        ("a.csv", "a,b\n", "no rows"),
        ("a.parquet", "not parquet", "not a readable parquet file"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n", "line 2 is not valid JSON .*too deeply"),
        ("a.jsonl", '{"text": ' + "1" * 5_000 + "}\n", "line 1 is not valid JSON .*digits"),
        ("a.json", json.dumps({"text": ["a", "b"], "id": [1]}), r"of one length, got \[1, 2\]"),
    ],
)
def test_defect_is_named_with_its_line(tmp_path, name, content, words):
    with pytest.raises(RunError, match=words):
        read_file(written(tmp_path / name, content))


def test_unknown_ending_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"must be one of \.jsonl"):
        read_file(written(tmp_path / "a.xml", "<a/>"))


def test_packed_file_is_named_as_one(tmp_path):
    with pytest.raises(UsageError, match="unpack it first"):
        read_file(written(tmp_path / "a.jsonl.gz", b"x"))


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        read_file(tmp_path / "nowhere.jsonl")


def test_directory_with_train_and_valid(tmp_path):
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl"):
        written(tmp_path / name, lines([{"text": name}]))
    train, valid, note = read_directory(tmp_path)
    assert (train.rows[0]["text"], valid.rows[0]["text"]) == ("train.jsonl", "valid.jsonl")
    assert "test.jsonl is left alone" in note
    (tmp_path / "valid.jsonl").unlink()
    _, held_out, note = read_directory(tmp_path)
    assert held_out.rows[0]["text"] == "test.jsonl"
    assert "evaluated on" in note


def test_directory_must_say_which_file_is_meant(tmp_path):
    with pytest.raises(RunError, match="no file train"):
        read_directory(tmp_path)
    for name in ("train.jsonl", "train.csv"):
        written(tmp_path / name, "x")
    with pytest.raises(RunError, match=r"train\.csv and train\.jsonl"):
        read_directory(tmp_path)


def test_hub_data_set_that_cannot_be_had_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(RunError, match=r"someone/data: .*not readable .*no network"):
        read_hub("someone/data", None, "train")


def test_hub_data_set_gives_rows(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read_hub("someone/data", "small", "test")
    assert asked == [("someone/data", "small", "test")]
    assert [table.rows[i] for i in range(2)] == ROWS
