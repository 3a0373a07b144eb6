"""From flags and a YAML file to a checked TrainConfig. Nothing is guessed and nothing is ignored.

An unknown name, two names for one option that disagree, and a setting for something that is not done here are errors.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from nf4lora.train.errors import UsageError
from nf4lora.train.folder import moved_from, write_text
from nf4lora.train.options import ALIASES, NULLABLE, OPTIONS, PER_CALL, TrainConfig
from nf4lora.train.values import boolean, boolean_or_auto

Settings = dict[str, tuple[Any, str]]  # canonical name -> value, name under which it was given


def _bits(value: Any) -> dict:
    if str(value) != "4":
        raise ValueError("must be 4 (for LoRA on the 16-bit model: load_in_4bit false)")
    return {"load_in_4bit": True}


def _adapter(value: Any) -> dict:
    if value not in ("qlora", "lora"):
        raise ValueError("must be qlora or lora")
    return {"load_in_4bit": value == "qlora"}


def _target_linear(value: Any) -> dict:
    return {"lora_target_modules": "all-linear"} if boolean(value) else {}


def _train_on_inputs(value: Any) -> dict:
    return {"assistant_only_loss": "auto" if not boolean(value) else False}


def _datasets(value: Any) -> dict:
    kinds = {"chat_template": "messages", "completion": "text", "input_output": "prompt_completion"}
    entry = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(entry, list):
        raise ValueError(f"must hold one data set (mixtures are not built yet), got {len(entry)}")
    entry = {"path": entry} if isinstance(entry, str) else entry
    known = {"path": "data", "type": "dataset_format", "name": "dataset_config", "split": "dataset_train_split"}
    if not isinstance(entry, dict) or "path" not in entry or set(entry) - set(known):
        raise ValueError(f"must hold one entry with {', '.join(known)}")
    return {known[key]: kinds.get(item, item) if key == "type" else item for key, item in entry.items()}


def _only(wanted: Any, why: str) -> Callable[[Any], dict]:
    """A name that others' files carry, accepted where it describes what is done here anyway."""

    def check(value: Any) -> dict:
        same = boolean(value) is wanted if isinstance(wanted, bool) and not isinstance(value, dict) else value == wanted
        if not same:
            raise ValueError(f"must be {str(wanted).lower()}: {why}")
        return {}

    return check


TRANSLATED: dict[str, Callable[[Any], dict]] = {
    "quantization_bit": _bits,
    "bits": _bits,
    "adapter": _adapter,
    "lora_target_linear": _target_linear,
    "train_on_inputs": _train_on_inputs,
    "train_on_prompt": _train_on_inputs,
    "datasets": _datasets,
    "finetuning_type": _only("lora", "only LoRA is trained"),
    "stage": _only("sft", "only supervised fine-tuning is done"),
    "do_train": _only(True, "nf4lora train trains"),
    "use_peft": _only(True, "only LoRA is trained"),
    "load_in_8bit": _only(False, "the base is NF4 or 16-bit"),
    "fp16": _only(False, "float16 would need loss scaling; use dtype bfloat16 or float32"),
    "push_to_hub": _only(False, "upload the output folder with `hf upload`"),
    "template": _only(None, "the tokenizer's own chat template is used"),
    "deepspeed": _only(None, "one process is used"),
    "fsdp": _only(None, "one process is used"),
}


def parse_arguments(arguments: list[str]) -> TrainConfig:
    """Command-line arguments (after `train`) to a checked configuration; flags win over the YAML file.

    Raises:
        UsageError: with the text to print.
    """
    given_flags, files = _read_flags(arguments)
    if len(files) > 1:
        raise UsageError(f"one configuration file, got {', '.join(files)}")
    file = _settings(_read_yaml(Path(files[0]).expanduser()), files[0]) if files else {}
    flags = _settings(given_flags, "flags", flag=True)
    _give_way(file, flags)
    if "output_dir" in file and moved_from(Path(files[0]).expanduser(), file["output_dir"][0]):
        file["output_dir"] = (str(Path(files[0]).expanduser().parent), files[0])
    values = {name: value for name, (value, _) in {**file, **flags}.items()}
    return check(TrainConfig(**values, given=frozenset(values)))


def _give_way(file: Settings, flags: Settings) -> None:
    """Drop what the file says where a flag rules it out, so that `--max_steps 3` works on a file with epochs."""
    said = {name: value for name, (value, _) in flags.items()}
    for group in (
        ("max_steps", "num_train_epochs"),
        ("data", "dataset_name", "train_file"),
        ("eval_file", "val_size", "dataset_test_split"),
    ):
        if said.keys() & set(group):
            for name in group:
                file.pop(name, None)
    for strategy, interval in (("eval_strategy", "eval_steps"), ("save_strategy", "save_steps")):
        if said.get(strategy, "steps") != "steps":
            file.pop(interval, None)
        if interval in said:
            file.pop(strategy, None)
    if said.get("lr_scheduler_type") == "constant":
        file.pop("warmup_steps", None)
    if said.get("load_in_4bit") is False:
        for name in [name for name in file if name.startswith("bnb_4bit")]:
            file.pop(name)


def _read_flags(arguments: list[str]) -> tuple[list[tuple[str, Any]], list[str]]:
    """-> (name, text) of each flag in order, and the configuration files."""
    flags: list[tuple[str, Any]] = []
    files: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            if not argument.endswith((".yaml", ".yml")):
                raise UsageError(
                    f"unexpected argument {argument!r}; options look like --learning_rate 1e-4, files end in .yaml"
                )
            files.append(argument)
            continue
        value: Any
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            following = arguments[position] if position < len(arguments) else "--"
            if not following.startswith("--") and not (_is_switch(name) and not _is_boolean(following)):
                value = following
                position += 1
            else:
                value = True  # --packing
        if name == "config":
            if value is True:
                raise UsageError("--config needs the path of a YAML file")
            files.append(str(value))
        else:
            flags.append((name, value))
    return flags, files


def _is_switch(name: str) -> bool:
    each = OPTIONS.get(ALIASES.get(name, name))
    return each is not None and each.metadata["parse"] in (boolean, boolean_or_auto)


def _is_boolean(value: str) -> bool:
    try:
        return boolean_or_auto(value) is not None
    except ValueError:
        return False


def _read_yaml(path: Path) -> list[tuple[str, Any]]:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        keys = [loader.construct_object(key) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UsageError(f"{path}: {twice} stands there twice")
        return {loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value}

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}: not valid YAML{place} ({getattr(error, 'problem', error)})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must hold `option: value` lines")
    return [(str(name), value) for name, value in content.items() if value is not None or name in NULLABLE]


def _settings(items: list[tuple[str, Any]], source: str, flag: bool = False) -> Settings:
    """Canonical names and parsed values. Two names of one option must agree; of a flag given twice the last counts."""
    settings: Settings = {}
    for name, value in items:
        shown = f"--{name}" if flag else f"{source}: {name}"
        try:
            if name in TRANSLATED:
                found = {key: OPTIONS[key].metadata["parse"](item) for key, item in TRANSLATED[name](value).items()}
            elif (canonical := ALIASES.get(name, name)) in OPTIONS:
                found = {canonical: OPTIONS[canonical].metadata["parse"](value)}
            else:
                raise UsageError(f"{shown} is not an option{_suggestion(name)}")
        except ValueError as error:
            raise UsageError(f"{shown} {error}, got {value!r}") from None
        for canonical, item in found.items():
            earlier = settings.get(canonical)
            if earlier is not None and earlier[0] != item and earlier[1] != shown:
                raise UsageError(f"{shown} says {item}, but {earlier[1]} says {earlier[0]}")
            settings[canonical] = (item, shown)
    return settings


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, [*OPTIONS, *ALIASES, *TRANSLATED], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; `nf4lora train --help` lists them"


def check(config: TrainConfig) -> TrainConfig:
    """Refuse what is missing or contradicts itself; fill in what follows from the rest."""
    given = config.given

    def refuse(when: Any, text: str) -> None:
        if when:
            raise UsageError(text)

    sources = [name for name in ("data", "dataset_name", "train_file") if getattr(config, name)]
    refuse(not config.model_name_or_path, "--model_name_or_path is missing: the folder or the Hub id of a model")
    refuse(not sources, "--data is missing: a file, a directory with train/valid files, or a Hub id")
    refuse(len(sources) > 1, f"{' and '.join(sources)} name the training data twice; keep one")
    refuse(config.eval_file and config.val_size, "eval_file and val_size both name the evaluation data; keep one")
    refuse(
        config.dataset_test_split and config.val_size, "dataset_test_split and val_size both name the evaluation data"
    )
    refuse(config.dataset_test_split and config.eval_file, "dataset_test_split and eval_file both name evaluation data")
    for name in ("train_file", "eval_file"):
        path = getattr(config, name)
        refuse(path and not os.path.isfile(path), f"{name}: {path} is not a file")
    refuse({"max_steps", "num_train_epochs"} <= given and config.max_steps, "max_steps and num_train_epochs; keep one")
    refuse(config.eval_steps and config.eval_strategy in ("epoch", "no"),
           f"eval_steps {config.eval_steps} contradicts eval_strategy {config.eval_strategy}")  # fmt: skip
    refuse("save_steps" in given and config.save_strategy != "steps",
           f"save_steps {config.save_steps} contradicts save_strategy {config.save_strategy}")  # fmt: skip
    if config.lr_scheduler_type == "constant":
        refuse("warmup_steps" in given and config.warmup_steps,
               "lr_scheduler_type constant has no warm-up; use constant_with_warmup, or warmup_steps 0")  # fmt: skip
        config.warmup_steps = 0
    refuse(not config.load_in_4bit and given & {"bnb_4bit_quant_type", "bnb_4bit_use_double_quant"},
           "load_in_4bit false contradicts the bnb_4bit options")  # fmt: skip
    refuse(config.page_to and config.optim == "adamw", "page_to needs a paged optimizer; optim adamw keeps all in RAM")
    if config.eval_strategy is None:
        config.eval_strategy = "steps" if config.eval_steps else "epoch"
    if config.eval_strategy == "steps" and not config.eval_steps:
        config.eval_steps = config.logging_steps
    if config.per_device_eval_batch_size is None:
        config.per_device_eval_batch_size = config.per_device_train_batch_size
    return config


def write(config: TrainConfig, path: Path) -> None:
    """The resolved options as YAML, ready to be given to `nf4lora train` again."""
    import yaml

    from nf4lora import __version__

    values = {each.name: getattr(config, each.name) for each in fields(config) if each.name in OPTIONS}
    values = {name: value for name, value in values.items() if name not in PER_CALL and value is not None}
    if config.max_steps:
        values.pop("num_train_epochs")
    if config.eval_strategy != "steps":
        values.pop("eval_steps", None)
    if config.save_strategy != "steps":
        values.pop("save_steps")
    if not config.load_in_4bit:
        values = {name: value for name, value in values.items() if not name.startswith("bnb_4bit")}
    values["report_to"] = config.report_to or "none"
    head = f"# written by nf4lora {__version__}; run again with: nf4lora train {shlex.quote(str(path))}\n"
    write_text(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
