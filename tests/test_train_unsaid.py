"""What a file of another tool does not say: that tool's default where a batch or a scaling hangs on it, and a note."""

import pytest

from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.run_folder.config_file import write

TRL = "model_name_or_path: m\ndataset_name: d\nuse_peft: true\n"
LLAMA_FACTORY = "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\nquantization_bit: 4\ndataset: d\n"
AXOLOTL = "base_model: m\ndatasets: [{path: d, type: alpaca}]\nadapter: qlora\n"
MLX = "model: m\ntrain: true\ndata: d\n"
OURS = "model_name_or_path: m\ndata: d\n"


def parsed(folder, text, *flags):
    path = folder / "file.yaml"
    path.write_text(text)
    return parse_arguments([str(path), *flags])


def rows_a_step(config):
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


@pytest.mark.parametrize(
    "text",
    [
        TRL + "per_device_train_batch_size: 8",
        "model_name_or_path: m\ndataset_name: d\nper_device_train_batch_size: 8",
        LLAMA_FACTORY + "per_device_train_batch_size: 8",
        AXOLOTL + "micro_batch_size: 8",
        MLX + "batch_size: 8",
    ],
)
def test_a_batch_size_alone_is_all_of_a_step_in_files_of_other_tools(tmp_path, text):
    config = parsed(tmp_path, text)
    assert rows_a_step(config) == 8
    assert "no gradient_accumulation_steps: 1, as other tools have it" in "\n".join(config.notes)
    assert rows_a_step(parsed(tmp_path, text, "--gradient_accumulation_steps", "2")) == 16
    assert rows_a_step(parsed(tmp_path, text + "\ngradient_accumulation_steps: 3")) == 24


def test_files_in_our_own_names_keep_our_defaults(tmp_path):
    config = parsed(tmp_path, OURS + "per_device_train_batch_size: 2\nlora_r: 8\n")
    assert (rows_a_step(config), config.lora_alpha, config.notes) == (16, 32, ())


@pytest.mark.parametrize("text", [TRL, LLAMA_FACTORY + "lora_rank: 4", MLX + "batch_size: 2"])
def test_a_written_configuration_says_all(tmp_path, text):
    config = parsed(tmp_path, text)
    write(config, tmp_path / "config.yaml")
    again = parse_arguments([str(tmp_path / "config.yaml")])
    assert again.notes == ()
    assert (rows_a_step(again), again.lora_r, again.lora_alpha) == (
        rows_a_step(config), config.lora_r, config.lora_alpha
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        (LLAMA_FACTORY + "lora_rank: 8", (), (8, 16)),
        (LLAMA_FACTORY + "lora_rank: 8", ("--lora_r", "4"), (4, 8)),
        (LLAMA_FACTORY + "lora_rank: 8", ("--lora_alpha", "4"), (8, 4)),
        (LLAMA_FACTORY + "lora_rank: 8\nlora_alpha: 8", (), (8, 8)),
        (LLAMA_FACTORY, (), (16, 32)),
        (TRL + "lora_r: 8", (), (8, 32)),
        (MLX + "lora_parameters: {scale: 20.0}", (), (8, 160)),
        (MLX + "lora_parameters: {rank: 4, scale: 20.0}", (), (4, 80)),
    ],
)
def test_scaling_is_that_of_the_tool(tmp_path, text, flags, expected):
    config = parsed(tmp_path, text, *flags)
    assert (config.lora_r, config.lora_alpha) == expected


def test_what_is_left_to_our_defaults_is_said_once(tmp_path):
    said = parsed(tmp_path, TRL + "max_steps: 3\nlora_r: 8", "--learning_rate", "1e-5").notes[-1]
    assert "lora_alpha 32" in said
    assert "gradient_accumulation_steps 8" in said
    assert "max_length 2048" in said
    assert not any(name in said for name in ("lora_r ", "learning_rate", "num_train_epochs"))
