"""From flags and a YAML file to a checked TrainConfig. Nothing is guessed and nothing is ignored silently.

An unknown name, two names for one option that disagree, and a setting for something that is not done here are errors,
which are listed at once. Keys of other tools that change nothing are left aside, and that is said (foreign.py).
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nf4lora.train.arguments.dependent import left_unsaid, settle
from nf4lora.train.arguments.foreign import ONLY, TRANSLATED, WISHES, aside, only
from nf4lora.train.arguments.yaml_file import read_yaml
from nf4lora.train.errors import UsageError
from nf4lora.train.run_folder.config_file import moved_from
from nf4lora.train.settings import ALIASES, NULLABLE, OPTIONS, TrainConfig, completed
from nf4lora.train.values import boolean, boolean_or_auto, checkpointing, compiling, resume

START = ("resume_from_checkpoint", "overwrite_output_dir")  # how a run begins in a folder that holds one
Values = dict[str, tuple[Any, str]]  # canonical name -> value, name under which it was given


@dataclass
class Given:
    """What a file or the flags say, and everything that is wrong with it."""

    values: Values = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wishes: set[str] = field(default_factory=set)  # options that are no error where they do not fit


def parse_arguments(arguments: list[str]) -> TrainConfig:
    """Command-line arguments (after `train`) to a checked configuration; flags win over the YAML file.

    Raises:
        UsageError: with the text to print.
    """
    given_flags, files = _read_flags(arguments)
    if len(files) > 1:
        raise UsageError(f"one configuration file, got {', '.join(files)}")
    lines = read_yaml(Path(files[0]).expanduser()) if files else []
    file = _read(lines, files[0]) if files else Given()
    flags = _read(given_flags, "")
    errors = [*file.errors, *flags.errors]
    if len(errors) > 1:
        raise UsageError(f"{len(errors)} settings cannot be used:\n    " + "\n    ".join(errors))
    if errors:
        raise UsageError(errors[0])
    _give_way(file.values, flags.values)
    if "output_dir" in file.values and moved_from(Path(files[0]).expanduser(), file.values["output_dir"][0]):
        file.values["output_dir"] = (str(Path(files[0]).expanduser().parent), files[0])
    values = {name: value for name, (value, _) in {**file.values, **flags.values}.items()}
    given = frozenset(values) - (file.wishes - flags.values.keys() | flags.wishes)
    unsaid = left_unsaid((name for name, _ in lines), values)
    return completed(TrainConfig(**values, given=given, notes=(*file.notes, *unsaid, *flags.notes)))


def _give_way(file: Values, flags: Values) -> None:
    """Drop what the file says where a flag rules it out, so that `--max_steps 3` works on a file with epochs."""
    flag_values = {name: value for name, (value, _) in flags.items()}
    for group in (
        ("max_steps", "num_train_epochs"),
        ("data", "dataset_name", "train_file"),
        ("eval_file", "val_size", "dataset_test_split"),
    ):
        if flag_values.keys() & set(group):
            for name in group:
                file.pop(name, None)
    for strategy, interval in (("eval_strategy", "eval_steps"), ("save_strategy", "save_steps")):
        if flag_values.get(strategy, "steps") != "steps":
            file.pop(interval, None)
        if interval in flag_values:
            file.pop(strategy, None)
    for one, other in (START, reversed(START)):
        if flag_values.get(one):
            file.pop(other, None)
    if flag_values.get("lr_scheduler_type") == "constant":
        file.pop("warmup_steps", None)
    if flag_values.get("load_in_4bit") is False:
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
    option = OPTIONS.get(ALIASES.get(name, name))
    parse = option and option.metadata["parse"]
    if parse is resume:  # a checkpoint is a folder
        return not following.endswith((".yaml", ".yml")) or os.path.isdir(following)
    return parse not in (boolean, boolean_or_auto, checkpointing, compiling) or _is_boolean(following)


def _is_boolean(value: str) -> bool:
    try:
        return boolean_or_auto(value) is not None
    except ValueError:
        return False


def _read(items: list[tuple[str, Any]], source: str) -> Given:
    """Canonical names and parsed values of a file, or of flags (without a source).

    Two names of one option must agree; of a flag given twice the last counts.
    """
    settled = settle(((name.replace("-", "_"), value) for name, value in items), in_file=bool(source))
    given = Given(errors=settled.errors, notes=settled.notes, wishes=settled.wishes)
    left_aside: dict[str, list[str]] = {}
    wished, demanded = set[str](), set[str]()
    for name, value in settled.items:
        shown = f"{source}: {name}" if source else f"--{name}"
        if value is None and name not in NULLABLE:
            continue
        try:
            options = _meaning(name, value, left_aside)
        except ValueError as error:
            rule = str(error)
            if value is True and not source and not rule.startswith("is not"):
                given.errors.append(f"{shown} needs a value behind it, which {rule}")
                continue
            got = "" if rule.startswith("is not") or ", got" in rule else f", got {value!r}"
            given.errors.append(f"{shown} {rule}{got if len(got) < 120 else got[:117] + '...'}")
            continue
        (wished if name in WISHES else demanded).update(options)
        for canonical, item in options.items():
            earlier = given.values.get(canonical)
            if earlier is not None and earlier[0] != item and earlier[1] != shown:
                given.errors.append(f"{shown} says {item}, but {earlier[1]} says {earlier[0]}")
            given.values[canonical] = (item, shown)
    given.wishes |= wished - demanded
    given.notes += [f"not used: {', '.join(names)} ({why})" for why, names in left_aside.items()]
    return given


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
