"""Flags and YAML to a checked configuration; every mistake gets one clear error and exit code 2."""

import ast
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from nf4lora.cli import main
from nf4lora.train.arguments.foreign import TRANSLATED
from nf4lora.train.arguments.parse import parse_arguments
from nf4lora.train.errors import UsageError
from nf4lora.train.run_folder import config_file as configuration
from nf4lora.train.settings import ALIASES, OPTIONS, help_text

NEEDED = ["--model_name_or_path", "m", "--data", "d.jsonl"]


def parsed(*arguments):
    return parse_arguments([*NEEDED, *arguments])


def yaml_file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_are_those_of_the_documentation():
    config = parsed()
    expected = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "dtype": "auto",
        "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": "all-linear", "max_length": 2048,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_train_epochs": 3,
        "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "optim": "auto", "page_to": None, "gradient_checkpointing": True, "packing": False,
        "assistant_only_loss": "auto", "output_dir": "outputs", "save_steps": 500, "save_total_limit": 2,
        "logging_steps": 10, "val_size": 0, "seed": 42, "deterministic": False, "report_to": [], "device": "auto",
        "dataset_format": "auto",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flag", "value", "name", "result"),
    [
        ("--lr", "1e-4", "learning_rate", 1e-4),
        ("--learning-rate", "1e-4", "learning_rate", 1e-4),
        ("--lora-rank", "8", "lora_r", 8),
        ("--r", "8", "lora_r", 8),
        ("--lora_target", "all", "lora_target_modules", "all-linear"),
        ("--lora_target_modules", "q_proj,v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--micro_batch_size", "4", "per_device_train_batch_size", 4),
        ("--cutoff_len", "512", "max_length", 512),
        ("--warmup_ratio", "0.1", "warmup_steps", 0.1),
        ("--bf16", "true", "dtype", "bfloat16"),
        ("--bf16", "false", "dtype", "float32"),
        ("--torch_dtype", "torch.bfloat16", "dtype", "bfloat16"),
        ("--bits", "4", "load_in_4bit", True),
        ("--adapter", "lora", "load_in_4bit", False),
        ("--optim", "adamw_torch", "optim", "adamw"),
        ("--optim", "adamw_torch_fused", "optim", "adamw"),
        ("--optim", "auto", "optim", "auto"),
        ("--optim", "paged_adamw", "optim", "paged_adamw_32bit"),
        ("--optim", "paged_adamw_32bit", "optim", "paged_adamw_32bit"),
        ("--optim", "paged_adamw_8bit", "optim", "paged_adamw_8bit"),
        ("--optim", "adamw_8bit", "optim", "paged_adamw_8bit"),
        ("--optimizer", "adamw_bnb_8bit", "optim", "paged_adamw_8bit"),
        ("--train_on_inputs", "true", "assistant_only_loss", False),
        ("--train_on_inputs", "false", "assistant_only_loss", "auto"),
        ("--max_steps", "-1", "max_steps", None),
        ("--resume_from_checkpoint", "true", "resume_from_checkpoint", "auto"),
        ("--report_to", "none", "report_to", []),
        ("--report_to", "tensorboard", "report_to", ["tensorboard"]),
        ("--save_steps", "0.25", "save_steps", 0.25),
    ],
)
def test_alias_means_its_option(flag, value, name, result):
    assert getattr(parsed(flag, value), name) == result
    assert getattr(parsed(f"{flag}={value}"), name) == result


def test_switch_needs_no_value():
    config = parse_arguments(["--packing", *NEEDED, "--overwrite-output-dir", "--resume_from_checkpoint"])
    assert (config.packing, config.overwrite_output_dir, config.resume_from_checkpoint) == (True, True, "auto")


def test_of_a_flag_given_twice_the_last_counts():
    assert parsed("--lr", "1e-4", "--lr", "3e-4").learning_rate == 3e-4


def test_flags_override_the_file(tmp_path):
    path = yaml_file(tmp_path, "base_model: m\ndata: d.jsonl\nlearning_rate: 1e-3\nmicro_batch_size: 2\n")
    for arguments in ([path, "--lr", "1e-4"], ["--lr=1e-4", "--config", path], ["--config=" + path, "--lr", "1e-4"]):
        config = parse_arguments(arguments)
        assert (config.learning_rate, config.per_device_train_batch_size) == (1e-4, 2)


def test_number_in_yaml_may_be_written_without_a_point(tmp_path):
    # YAML 1.1 reads 1e-4 as a string
    assert parse_arguments([yaml_file(tmp_path, "model: m\ndata: d\nlr: 1e-4\n")]).learning_rate == 1e-4


def test_flag_may_rule_out_what_the_file_says(tmp_path):
    path = yaml_file(
        tmp_path,
        "model: m\ndata: d\nnum_train_epochs: 3\neval_steps: 5\nval_size: 2\n"
        "lr_scheduler_type: cosine\nwarmup_steps: 9\n",
    )
    config = parse_arguments([path, "--max_steps", "3", "--eval_strategy", "no", "--lr_scheduler_type", "constant"])
    assert (config.max_steps, config.eval_steps, config.warmup_steps) == (3, None, 0)


def test_file_of_another_tool_is_understood(tmp_path):
    path = yaml_file(
        tmp_path,
        "base_model: m\nadapter: qlora\nload_in_4bit: true\nload_in_8bit: false\nlora_target_linear: true\n"
        "datasets:\n  - path: d.jsonl\n    type: alpaca\nsequence_len: 512\nval_set_size: 0.1\nsave_strategy: no\n",
    )
    config = parse_arguments([path])
    assert (config.data, config.dataset_format, config.max_length, config.val_size) == ("d.jsonl", "alpaca", 512, 0.1)
    assert (config.load_in_4bit, config.lora_target_modules, config.save_strategy) == (True, "all-linear", "no")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lerning_rate", "1"], "did you mean learning_rate"),
        (["--max-seq-lenght", "1"], "did you mean max_seq_length"),
        (["--zzzz", "1"], "--help"),
        (["extra=1"], "unexpected argument"),
        (["--learning_rate", "-1"], "must be a number above 0"),
        (["--learning_rate", "fast"], "must be a number above 0"),
        (["--learning_rate"], "must be a number above 0"),
        (["--lora_r", "1.5"], "whole number"),
        (["--lora_r", "0"], "whole number, 1 or more"),
        (["--lora_dropout", "1"], "below 1"),
        (["--packing=maybe"], "must be true or false"),
        (["--packing", "maybe"], "unexpected argument 'maybe'"),
        (["--dataset_format", "xml"], "must be one of auto, messages"),
        (["--bnb_4bit_quant_type", "fp4"], "must be one of nf4"),
        (["--quantization_bit", "8"], "must be 4"),
        (["--optim", "sgd"], "must be one of auto, adamw, paged_adamw_32bit, paged_adamw_8bit, got 'sgd'"),
        (["--optim", "adamw", "--page_to", "."], "page_to needs a paged optimizer"),
        (["--dtype", "float16"], "loss scaling"),
        (["--fp16", "true"], "loss scaling"),
        (["--device", "tpu"], "must be auto, cpu, cuda"),
        (["--finetuning_type", "full"], "only LoRA"),
        (["--deepspeed", "ds.json"], "one process"),
        (["--max_steps", "3", "--num_train_epochs", "1"], "keep one"),
        (["--lr", "1e-4", "--learning_rate", "2e-4"], "--learning_rate says 0.0002, but --lr says 0.0001"),
        (["--train_file", "x.jsonl"], "name the training data twice"),
        (["--eval_file", "nowhere.jsonl"], "is not a file"),
        (["--eval_steps", "5", "--eval_strategy", "epoch"], "contradicts"),
        (["--lr_scheduler_type", "constant", "--warmup_steps", "5"], "constant_with_warmup"),
        (["--load_in_4bit", "false", "--double_quant", "true"], "contradicts"),
        (["nowhere.yaml"], "no such file"),
        (["a.yaml", "b.yaml"], "one configuration file"),
        (["--config", "nowhere.yaml"], "no such file"),
        (["--config"], "needs the path"),
    ],
)
def test_mistake_is_named(arguments, words):
    with pytest.raises(UsageError, match=words):
        parsed(*arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\nmodel: n\n", "stands there twice"),
        ("model: [\n", "not valid YAML at line 2"),
        ("- a\n", "must hold"),
        ("model: m\nbase_model: n\ndata: d\n", "says n, but .*model says m"),
        ("model: m\ndatasets: [{path: a}, {path: b}]\n", "mixtures are not built yet"),
        ("model: m\ndata: d\nlora: {r: 8}\n", "did you mean lora_r"),
        ("data: d\n", "model_name_or_path is missing"),
        ("model: m\n", "data is missing"),
    ],
)
def test_mistake_in_the_file_is_named(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        parse_arguments([yaml_file(tmp_path, text)])


def test_resolved_file_reads_back_as_the_same_options(tmp_path):
    config = parsed("--max_steps", "7", "--lora_target_modules", "q_proj,v_proj", "--dtype", "float32", "--packing")
    configuration.write(config, tmp_path / "config.yaml")
    again = parse_arguments([str(tmp_path / "config.yaml")])
    assert {name: getattr(again, name) for name in OPTIONS} == {name: getattr(config, name) for name in OPTIONS}


def test_resolved_file_holds_nothing_of_one_call(tmp_path):
    configuration.write(parsed("--resume_from_checkpoint", "--dry_run"), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "resume" not in text
    assert "dry_run" not in text


def test_no_alias_shadows_an_option():
    assert not set(ALIASES) & set(OPTIONS)
    assert not set(TRANSLATED) & (set(ALIASES) | set(OPTIONS))


def test_help_names_every_option_and_alias():
    text = help_text()
    assert all(f"--{name}" in text for name in OPTIONS)
    assert all(alias in text for alias in ALIASES)


def test_exit_codes_of_the_command_line(capsys):
    assert main.main(["train", "--help"]) == 0
    assert main.main(["--version"]) == 0
    assert main.main([]) == 2
    assert main.main(["trian"]) == 2
    assert "did you mean train" in capsys.readouterr().err
    assert main.main(["train", *NEEDED, "--lora_rnk", "3"]) == 2
    assert "did you mean lora_rank" in capsys.readouterr().err
    assert main.main(["doctor", "--verbose"]) == 2


@pytest.mark.slow
def test_help_and_usage_errors_import_no_trainer():
    code = (
        "import sys, torch, transformers; theirs = set(sys.modules);"  # torch 2.11 has them import rich
        "from nf4lora.cli.main import main; main(['train', '--help']); main(['train', '--lr', 'x']);"
        "print(sorted({'trl', 'datasets', 'peft', 'matplotlib', 'rich'} & sys.modules.keys() - theirs))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("text", "flag", "expected"),
    [
        ("overwrite_output_dir: true", "--resume_from_checkpoint", ("auto", False)),
        ("resume_from_checkpoint: true", "--overwrite_output_dir", (None, True)),
        ("overwrite_output_dir: true", "--resume_from_checkpoint=false", (None, True)),
        ("overwrite_output_dir: true", "--packing", (None, True)),
    ],
)
def test_flag_decides_how_a_run_begins(tmp_path, text, flag, expected):
    config = parse_arguments([yaml_file(tmp_path, f"model: m\ndata: d\n{text}\n"), flag])
    assert (config.resume_from_checkpoint, config.overwrite_output_dir) == expected


def test_file_behind_a_flag_that_may_stand_alone_is_the_configuration(tmp_path):
    path = yaml_file(tmp_path, "model: m\ndata: d\n")
    for flag in ("--resume_from_checkpoint", "--resume-from-checkpoint", "--packing"):
        assert parse_arguments([flag, path]).model_name_or_path == "m"
    assert parse_arguments(["--resume_from_checkpoint", path]).resume_from_checkpoint == "auto"
    (tmp_path / "checkpoint-1.yaml").mkdir()
    folder = str(tmp_path / "checkpoint-1.yaml")
    assert parsed("--resume_from_checkpoint", folder).resume_from_checkpoint == folder


NUMBERS = [name for name, each in OPTIONS.items() if each.type in ("int", "float", "int | None", "float | None")]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400", "1e30", "-1e30", "-5", "", "true", "x"])
@pytest.mark.parametrize("name", NUMBERS)
def test_number_that_no_run_can_have_is_refused(name, value):
    if value == "1e30" and name in ("learning_rate", "weight_decay", "max_grad_norm"):  # no counts
        return
    with pytest.raises(UsageError, match=f"--{name} must be a (whole )?number"):
        parsed(f"--{name}", value)


def test_largest_seed_is_that_of_numpy():
    assert parsed("--seed", "4294967295").seed == 2**32 - 1
    with pytest.raises(UsageError, match="--seed must be a whole number, 0 or more, 4294967295 at most"):
        parsed("--seed", "4294967296")


@pytest.mark.parametrize("flag", ["--lr", "--model", "--seed", "--optim", "--report_to", "--lora_target_modules"])
def test_flag_without_its_value_is_named(flag):
    with pytest.raises(UsageError, match=f"{flag} needs a value behind it, which must "):
        parse_arguments([*NEEDED, flag, "--packing"])


def test_configuration_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes("model: m\n".encode("utf-16"))
    with pytest.raises(UsageError, match="must be UTF-8 text"):
        parse_arguments([str(path)])


def test_a_configuration_is_replaced_in_one_file_and_changed_nowhere():
    with pytest.raises(FrozenInstanceError):
        parsed().seed = 1
    package = Path(configuration.__file__).parents[1]
    elsewhere = {path.name for path in package.rglob("*.py") if any(map(makes_another, ast.walk(syntax_of(path))))}
    assert elsewhere == {"settings.py"}


def syntax_of(path):
    return ast.parse(path.read_text())


def makes_another(node):
    """replace(config, ...), setattr(config, ...) and config.__dict__"""
    if isinstance(node, ast.Attribute):
        return node.attr == "__dict__"
    called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
    return called in ("replace", "setattr", "__setattr__") and any(
        "config" in ast.unparse(each) for each in node.args[:1]
    )
