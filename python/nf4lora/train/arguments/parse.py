"""From flags and a YAML file to a checked TrainConfig. Nothing is guessed and nothing is ignored silently.

An unknown name, two names for one option that disagree, and a setting for something that is not done here are errors,
which are listed at once. Keys of other tools that change nothing are left aside, and that is said (foreign.py).
"""

from __future__ import annotations

import difflib
import os
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nf4lora.train.arguments.dependent import left_unsaid, together
from nf4lora.train.arguments.foreign import ONLY, TRANSLATED, aside, only
from nf4lora.train.arguments.yaml_file import read_yaml
from nf4lora.train.errors import UsageError
from nf4lora.train.paths import nearby, not_here
from nf4lora.train.run_folder.files import CONFIG_HEAD, moved_from, write_text
from nf4lora.train.settings import ALIASES, NULLABLE, OPTIONS, PER_CALL, TrainConfig
from nf4lora.train.values import boolean, boolean_or_auto, checkpointing, resume

START = ("resume_from_checkpoint", "overwrite_output_dir")  # how a run begins in a folder that holds one
Values = dict[str, tuple[Any, str]]  # canonical name -> value, name under which it was given


@dataclass
class Settings:
    """What a file or the flags say, and everything that is wrong with it."""

    values: Values = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wishes: set[str] = field(default_factory=set)  # options that nobody misses where they cannot be followed


def parse_arguments(arguments: list[str]) -> TrainConfig:
    """Command-line arguments (after `train`) to a checked configuration; flags win over the YAML file.

    Raises:
        UsageError: with the text to print.
    """
    given_flags, files = _read_flags(arguments)
    if len(files) > 1:
        raise UsageError(f"one configuration file, got {', '.join(files)}")
    lines = read_yaml(Path(files[0]).expanduser()) if files else []
    file = _settings(lines, files[0]) if files else Settings()
    flags = _settings(given_flags, "")
    errors = [*file.errors, *flags.errors]
    if len(errors) > 1:
        raise UsageError(f"{len(errors)} settings cannot be used:\n    " + "\n    ".join(errors))
    if errors:
        raise UsageError(errors[0])
    _give_way(file.values, flags.values)
    if "output_dir" in file.values and moved_from(Path(files[0]).expanduser(), file.values["output_dir"][0]):
        file.values["output_dir"] = (str(Path(files[0]).expanduser().parent), files[0])
    values = {name: value for name, (value, _) in {**file.values, **flags.values}.items()}
    given = frozenset(values) - (file.wishes | flags.wishes)
    unsaid = left_unsaid((name for name, _ in lines), values)
    return check(TrainConfig(**values, given=given, notes=(*file.notes, *unsaid, *flags.notes)))


def _give_way(file: Values, flags: Values) -> None:
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
    for one, other in (START, reversed(START)):
        if said.get(one):
            file.pop(other, None)
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
            if not following.startswith("--") and _may_be_value(name, following):
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


def _may_be_value(name: str, following: str) -> bool:
    """Whether the word behind a flag is its value, where the flag may stand alone."""
    each = OPTIONS.get(ALIASES.get(name, name))
    parse = each and each.metadata["parse"]
    if parse is resume:  # a checkpoint is a folder
        return not following.endswith((".yaml", ".yml")) or os.path.isdir(following)
    return parse not in (boolean, boolean_or_auto, checkpointing) or _is_boolean(following)


def _is_boolean(value: str) -> bool:
    try:
        return boolean_or_auto(value) is not None
    except ValueError:
        return False


def _settings(items: list[tuple[str, Any]], source: str) -> Settings:
    """Canonical names and parsed values of a file, or of flags (without a source).

    Two names of one option must agree; of a flag given twice the last counts.
    """
    settled = together(((name.replace("-", "_"), value) for name, value in items), in_file=bool(source))
    settings = Settings(errors=settled.errors, notes=settled.notes, wishes=settled.wishes)
    left_aside: dict[str, list[str]] = {}
    for name, value in settled.items:
        shown = f"{source}: {name}" if source else f"--{name}"
        if value is None and name not in NULLABLE:
            continue
        try:
            found = _meaning(name, value, left_aside)
        except ValueError as error:
            said = str(error)
            if value is True and not source and not said.startswith("is not"):
                settings.errors.append(f"{shown} needs a value behind it, which {said}")
                continue
            got = "" if said.startswith("is not") or ", got" in said else f", got {value!r}"
            settings.errors.append(f"{shown} {said}{got if len(got) < 120 else got[:117] + '...'}")
            continue
        for canonical, item in found.items():
            earlier = settings.values.get(canonical)
            if earlier is not None and earlier[0] != item and earlier[1] != shown:
                settings.errors.append(f"{shown} says {item}, but {earlier[1]} says {earlier[0]}")
            settings.values[canonical] = (item, shown)
    settings.notes += [f"not used: {', '.join(names)} ({why})" for why, names in left_aside.items()]
    return settings


def _meaning(name: str, value: Any, left_aside: dict[str, list[str]]) -> dict[str, Any]:
    """Options and parsed values for a name; nothing where it is left aside.

    Raises:
        ValueError: an unknown name, or a value that cannot be honoured.
    """
    if name in TRANSLATED:
        return {key: OPTIONS[key].metadata["parse"](item) for key, item in TRANSLATED[name](value).items()}
    if (canonical := ALIASES.get(name, name)) in OPTIONS:
        return {canonical: OPTIONS[canonical].metadata["parse"](value)}
    if name in ONLY:
        only(name, value)
        return {}
    if why := aside(name):
        left_aside.setdefault(why, []).append(name)
        return {}
    if isinstance(value, dict) and "_component_" in value:
        raise ValueError("is not an option: this is a torchtune recipe; write its values as options of their own")
    raise ValueError(f"is not an option{_suggestion(name)}")


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, [*OPTIONS, *ALIASES, *TRANSLATED], n=1, cutoff=0.8)
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
        refuse(
            path and not os.path.isfile(os.path.expanduser(path)), f"{name}: {path} is not a file{nearby(path or '')}"
        )
    base = config.model_name_or_path or ""
    refuse(base and not os.path.isdir(os.path.expanduser(base)) and not_here(base),
           f"model_name_or_path: {base} is not a folder{nearby(base)}")  # fmt: skip
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

    from nf4lora import _C  # type: ignore[attr-defined]

    values = {each.name: getattr(config, each.name) for each in fields(config) if each.name in OPTIONS}
    values = {name: value for name, value in values.items() if name not in PER_CALL and value is not None}
    if "dataset_train_split" not in config.given:  # a folder is searched where none is named
        values.pop("dataset_train_split")
    if config.max_steps:
        values.pop("num_train_epochs")
    if config.eval_strategy != "steps":
        values.pop("eval_steps", None)
    if config.save_strategy != "steps":
        values.pop("save_steps")
    if not config.load_in_4bit:
        values = {name: value for name, value in values.items() if not name.startswith("bnb_4bit")}
    values["report_to"] = config.report_to or "none"
    head = f"{CONFIG_HEAD}{_C.__version__}; run again with: nf4lora train {shlex.quote(str(path))}\n"
    write_text(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
