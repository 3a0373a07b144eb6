"""Folders of data, as people and the Hub lay them out."""

import json

import pytest

from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.data import read
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.run_folder import config_file as configuration
from nf4lora.train.samples.folders import read_directory


def lay(folder, *names):
    """Files that hold one row each: their own name. Parquet where they are called so."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist([{"text": name}]), path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")
    return folder


def texts(table):
    return table and [row["text"] for row in table.rows]


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "README.md"], 2, None),
        (["train-00000-of-00001-0a1b2c3d4e5f6789.parquet", "test-00000-of-00001.parquet"], 1, 1),
        (["default/train-00000-of-00001.parquet", "default/validation-00000-of-00001.parquet"], 1, 1),
        (["train/a.jsonl", "valid/b.jsonl"], 1, 1),
        (["train/part-000.jsonl", "train/part-001.jsonl"], 2, None),
        (["train.jsonl", "dataset_infos.json", ".cache/huggingface/train.jsonl"], 1, None),
        (["my_rows.jsonl"], 1, None),
        (["my_rows.jsonl", "test.jsonl"], 1, 1),
        (["train_sft.jsonl", "test.jsonl"], 1, 1),
    ],
)
def test_splits_are_found(tmp_path, names, train, held_out):
    rows, other, _ = read_directory(lay(tmp_path, *names))
    assert len(rows.rows) == train
    assert (other and len(other.rows)) == held_out
    assert not any("cache" in text or "infos" in text for text in texts(rows))


def test_rows_of_shards_are_named_by_their_file(tmp_path):
    table, _, _ = read_directory(lay(tmp_path, "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"))
    assert texts(table) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert table.where(1) == f"{tmp_path / 'train-00001-of-00002.jsonl'}: line 1"
    assert table.select([1]).where(0) == table.where(1)


def test_missing_shard_is_an_error(tmp_path):
    lay(tmp_path, "data/train-00000-of-00003.jsonl", "data/train-00002-of-00003.jsonl")
    with pytest.raises(RunError, match="train the shard 00001 is missing"):
        read_directory(tmp_path)


def test_configurations_and_splits_are_chosen_by_name(tmp_path):
    lay(tmp_path, "en/train-00000-of-00001.jsonl", "de/train-00000-of-00001.jsonl", "de/odd.jsonl")
    with pytest.raises(UsageError, match="several configurations, de, en"):
        read_directory(tmp_path)
    assert texts(read_directory(tmp_path, "de")[0]) == ["de/train-00000-of-00001.jsonl"]
    assert texts(read_directory(tmp_path, "de", "odd", "train")[1]) == ["de/train-00000-of-00001.jsonl"]
    with pytest.raises(UsageError, match="dataset_config fr"):
        read_directory(tmp_path, "fr")
    with pytest.raises(UsageError, match="dataset_train_split all: .* holds odd, train"):
        read_directory(tmp_path, "de", "all")


def test_several_training_splits_are_not_guessed_between(tmp_path):
    lay(tmp_path, "train_sft.jsonl", "train_gen.jsonl")
    with pytest.raises(RunError, match="name one of train_gen, train_sft as dataset_train_split"):
        read_directory(tmp_path)
    config = parse_arguments(["--model", "m", "--data", str(tmp_path), "--dataset_train_split", "train_sft"])
    assert texts(read(config)[0]) == ["train_sft.jsonl"]


def test_two_files_of_one_split_could_both_be_meant(tmp_path):
    lay(tmp_path, "train/a.jsonl", "train/b.jsonl")
    with pytest.raises(RunError, match=r"a\.jsonl and train/b\.jsonl could both be meant"):
        read_directory(tmp_path)


def test_folder_of_save_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    assert texts(read_directory(tmp_path / "one")[0]) == ["a", "b"]
    train, test, _ = read_directory(tmp_path / "two")
    assert (texts(train), texts(test)) == (["a", "b"], ["a"])
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(RunError, match="cannot be read as a folder of datasets.save_to_disk"):
        read_directory(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data/trian.jsonl", r"no such file or directory; did you mean data/train\.jsonl"),
        ("data/chats_v2", "did you mean data/chats-v2"),
        ("data/sub/x", r"no such file or directory \(data holds no sub\)"),
        ("data/", ""),
    ],
)
def test_mistyped_path_is_taken_for_a_path(tmp_path, monkeypatch, name, words):
    lay(tmp_path, "data/train.jsonl", "data/chats-v2/train.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nf4lora.train.data.read_hub", lambda *_: pytest.fail("looked on the Hub"))
    config = parse_arguments(["--model", "m", "--data", name])
    if words:
        with pytest.raises(UsageError, match=words):
            read(config)
    else:
        assert read(config)[0].rows


def test_mistyped_model_is_taken_for_a_path(tmp_path, monkeypatch):
    (tmp_path / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("models/SmolLM2-135M-Instuct", "models/smollm2-135M-instruct"):
        with pytest.raises(UsageError, match="is not a folder; did you mean models/SmolLM2-135M-Instruct"):
            parse_arguments(["--model", name, "--data", "d"])
    assert parse_arguments(["--model", "models/SmolLM2-360M-Instruct", "--data", "d"])  # another size: the Hub may know


def test_home_is_expanded(tmp_path, monkeypatch):
    lay(tmp_path, "train.jsonl", "valid.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_arguments(["--model", "m", "--data", "~/train.jsonl", "--eval_file", "~/valid.jsonl"])
    train, valid, _ = read(config)
    assert (texts(train), texts(valid)) == (["train.jsonl"], ["valid.jsonl"])


def test_first_rows_are_taken_on_request(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(9)))
    config = parse_arguments(["--model", "m", "--data", str(path), "--max_samples", "3"])
    assert texts(read(config)[0]) == ["0", "1", "2"]


@pytest.mark.parametrize("names", [["my_rows.jsonl"], ["train_sft.jsonl", "test.jsonl"], ["training/a.jsonl"]])
def test_the_options_that_a_run_writes_down_find_the_same_split(tmp_path, names):
    folder = lay(tmp_path / "rows", *names)
    config = parse_arguments(["--model", "m", "--data", str(folder), "--eval_strategy", "no"])
    configuration.write(config, tmp_path / "config.yaml")
    again = parse_arguments([str(tmp_path / "config.yaml")])
    assert texts(read(again)[0]) == texts(read(config)[0])
    named = parse_arguments(["--model", "m", "--data", str(folder), "--dataset_train_split", "train"])
    configuration.write(named, tmp_path / "config.yaml")
    assert "dataset_train_split: train\n" in (tmp_path / "config.yaml").read_text()
