"""A YAML file of options means what its author wrote, and is refused with its line where it means nothing."""

import re

import pytest

from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.errors import UsageError


def parsed(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return parse_arguments([str(path)])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("output_dir: 010", "output_dir", "010"),
        ("output_dir: 1e5", "output_dir", "1e5"),
        ("output_dir: 2024-01-01", "output_dir", "2024-01-01"),
        ("output_dir: 1:30", "output_dir", "1:30"),
        ("output_dir: 0x1F", "output_dir", "0x1F"),
        ("output_dir: yes", "output_dir", "yes"),
        ("output_dir: 1_000", "output_dir", "1_000"),
        ("output_dir: 'null'", "output_dir", "null"),
        ("model_revision: 6299857", "model_revision", "6299857"),
        ("model_revision: 1e10", "model_revision", "1e10"),
        ("lr: 1e-4", "learning_rate", 1e-4),
        ("lr: 1E-4", "learning_rate", 1e-4),
        ("lr: .0001", "learning_rate", 1e-4),
        ("lora_r: 010", "lora_r", 10),
        ("save_strategy: no", "save_strategy", "no"),
        ("save_strategy: off", "save_strategy", "no"),
        ("packing: yes", "packing", True),
        ("packing: Off", "packing", False),
        ("packing: TRUE", "packing", True),
        ("bf16: yes", "dtype", "bfloat16"),
        ("resume_from_checkpoint: no", "resume_from_checkpoint", None),
        ("resume_from_checkpoint: on", "resume_from_checkpoint", "auto"),
        ("lora_target_modules: [y, n]", "lora_target_modules", ["y", "n"]),
        ("seed: ~", "seed", 42),
        ("seed:", "seed", 42),
        ("seed: NULL", "seed", 42),
    ],
)
def test_yaml_means_what_its_author_wrote(tmp_path, text, name, value):
    assert getattr(parsed(tmp_path, f"model: m\ndata: d\n{text}\n"), name) == value


def test_merge_keys_are_followed(tmp_path):
    config = parsed(
        tmp_path,
        "common: &common {model: m, lr: 1e-4, seed: 1}\nmore: &more\n  lora_r: 4\n"
        "<<: [*common, *more]\ndata: d\nseed: 2\n",
    )
    assert (config.model_name_or_path, config.learning_rate, config.lora_r, config.seed) == ("m", 1e-4, 4, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("? [a, b]\n: 1\n", "line 1: a name must be a word"),
        ("model: m\ndata: {{ rows }}\n", "a name must be a word"),
        ("model: !!python/object:os.system {}\n", "not valid YAML at line 1"),
        ("a: &a [*a]\n", "not valid YAML at line 1 .*recursive"),
        ("--- {model: m}\n--- {model: n}\n", "not valid YAML"),
        ("model:\tm\n", "at line 1 .*; write spaces in its place"),
        ("model: m\ndata: d\nseed: 1\nseed: 2\n", "line 4: seed stands there twice"),
        ("", "must hold `option: value`"),
        ("~\n", "must hold `option: value`"),
    ],
)
def test_yaml_that_is_no_list_of_options_is_refused(tmp_path, text, words):
    with pytest.raises(UsageError) as error:
        parsed(tmp_path, text)
    assert re.search(words, str(error.value))
