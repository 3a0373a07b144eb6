"""Keys of configuration files whose meaning depends on other keys, put into our words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nf4lora.train.arguments.foreign import COLUMN_OF
from nf4lora.train.settings import OPTIONS, default, shown
from nf4lora.train.values import boolean

EPOCHS = ("num_train_epochs", "num_epochs", "epochs")

OWN = {*OPTIONS, "model", "base", "lr", "r", "epochs"} - {"dataset_name"}  # names that files for nf4lora have
DECIDING = (  # options that every tool has a default of its own for
    "lora_r", "lora_alpha", "lora_dropout", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_length",
)  # fmt: skip


@dataclass
class Settled:
    """The keys of a file or of flags, with those that depend on one another put into our words."""

    items: list[tuple[str, Any]]
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wishes: set[str] = field(default_factory=set)  # options that are no error where they do not fit


def settle(items: Iterable[tuple[str, Any]], in_file: bool = True) -> Settled:
    """Settle the keys that need others to be understood; the rest passes as it is.

    In a file max_steps decides over epochs, as it does for Trainer; two flags that say both are a contradiction.
    """
    given = dict(items)
    result = Settled([])
    model = next((given[name] for name in ("base_model", "model_name_or_path", "model") if given.get(name)), None)
    for name in ("tokenizer_config", "tokenizer_name_or_path", "tokenizer_name", "base_model_config"):
        if given.get(name) in (None, model):
            given.pop(name, None)
        elif name in given:
            result.errors.append(f"{name} must be the model's own, {model}, got {given.pop(name)}")
    if _true(given.get("lora_target_linear")) and given.get("lora_target_modules"):
        result.notes.append("lora_target_linear takes in every linear layer, those of lora_target_modules among them")
        del given["lora_target_modules"]
    if given.get("chat_template") == "jinja" and given.get("chat_template_jinja"):
        given["chat_template"] = given.pop("chat_template_jinja")
    if {"batch_size", "micro_batch_size"} <= set(given) and "gradient_accumulation_steps" not in given:
        _share_batch(given, result)
    epochs = [name for name in EPOCHS if given.get(name) is not None]
    _per_epoch(given, result)
    if in_file and epochs and given.get("max_steps") not in (None, "-1", -1):
        result.notes.append(f"max_steps decides how long the run is; {epochs[0]} has no effect")
        given = {name: value for name, value in given.items() if name not in epochs}
    _data_set_of_llama_factory(given, result)
    _liger_of_axolotl(given)
    _say_what_differs(given, result)
    result.items = list(given.items())
    return result


def left_unsaid(names: Iterable[str], values: dict[str, Any]) -> list[str]:
    """Add to the values what a file of another tool leaves to that tool's defaults; returns what is to be said.

    Such a file has names that are not nf4lora's own. A batch size alone is all of a step there; here it would be
    taken `gradient_accumulation_steps` times.
    """
    names = {name.replace("-", "_") for name in names}
    if names <= OWN:
        return []
    notes = []
    if "per_device_train_batch_size" in values and "gradient_accumulation_steps" not in values:
        values["gradient_accumulation_steps"] = 1
        notes.append(
            "the file has a batch size and no gradient_accumulation_steps: 1, as other tools have it "
            f"(nf4lora's own default is {default('gradient_accumulation_steps')})"
        )
    if "lora_rank" in names and "lora_r" in values and "lora_alpha" not in values:
        values["lora_alpha"] = 2 * values["lora_r"]
        notes.append(f"lora_alpha is not given: {values['lora_alpha']}, twice the rank, as LLaMA-Factory has it")
    instead = {"num_train_epochs"} if values.get("max_steps") else set()
    left = [f"{name} {shown(default(name))}" for name in DECIDING if name not in {*values, *instead}]
    if left:
        notes.append(f"not in the file, so nf4lora's defaults, which may not be those of its tool: {', '.join(left)}")
    return notes


def _true(value: Any) -> bool:
    try:
        return value is not None and boolean(value)
    except ValueError:
        return False


def _share_batch(given: dict, result: Settled) -> None:
    """Axolotl's batch_size counts the rows of a whole step."""
    try:
        batch, micro = int(given["batch_size"]), int(given["micro_batch_size"])
    except (TypeError, ValueError):
        return
    if micro > 0 and batch % micro == 0:
        given["gradient_accumulation_steps"] = batch // micro
        del given["batch_size"]


def _per_epoch(given: dict, result: Settled) -> None:
    """Axolotl's evaluations and checkpoints per epoch, as shares of all steps."""
    otherwise = default("num_train_epochs") if given.get("max_steps") is None else 1.0
    for name, what in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        value = given.pop(name, None)
        if value is None:
            continue
        try:
            times = int(value)
            epochs = float(next((given[key] for key in EPOCHS if given.get(key) is not None), otherwise))
        except (TypeError, ValueError):
            times, epochs = -1, 1.0
        if times < 0:
            result.errors.append(f"{name} must be a whole number, 0 or more, got {value!r}")
        elif any(given.get(f"{what}_{ending}") is not None for ending in ("steps", "strategy")):
            result.errors.append(f"{name} and {what}_steps or {what}_strategy say the same thing twice; keep one")
        elif times in (0, 1) or times * epochs <= 1:
            given[f"{what}_strategy"] = "epoch" if times else "no"
        else:
            given[f"{what}_steps"] = 1 / (times * epochs)
        result.wishes |= {f"{what}_steps", f"{what}_strategy"} if what == "eval" else set()


def _data_set_of_llama_factory(given: dict, result: Settled) -> None:
    """`dataset: name` is an entry of dataset_info.json in `dataset_dir`, which names a file or a data set."""
    folder = given.pop("dataset_dir", None)
    if "dataset" not in given or given["dataset"] is None:
        return
    names = given["dataset"] if isinstance(given["dataset"], list) else str(given["dataset"]).split(",")
    names = [str(item).strip() for item in names if str(item).strip()]
    if len(names) > 1 and not Path(str(given["dataset"])).exists():
        result.errors.append(f"dataset must name one data set (mixtures are not built yet), got {', '.join(names)}")
        del given["dataset"]
        return
    listing = Path(str(folder or "data")).expanduser() / "dataset_info.json"
    if not listing.is_file() or not names:
        if folder is not None and names and (listing.parent / names[0]).exists():
            given["dataset"] = str(listing.parent / names[0])
        return
    try:
        entry = json.loads(listing.read_text(encoding="utf-8")).get(names[0])
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        result.errors.append(f"{listing}: cannot be read ({error})")
        return
    if entry is None:
        return
    options = _listed(entry, listing.parent)
    if isinstance(options, str):
        result.errors.append(f"dataset {names[0]}: {listing} has {options}")
    else:
        del given["dataset"]
        given |= options


def _listed(entry: dict, folder: Path) -> dict | str:
    """Our options for an entry of dataset_info.json; a text says what cannot be honoured."""
    columns = {
        "prompt": ("instruction", "prompt"), "query": ("input",), "response": ("output", "response"),
        "system": ("system",), "history": ("history",), "tools": ("tools",), "messages": ("conversations", "messages"),
    }  # fmt: skip
    tags = {
        "role_tag": ("from", "role"), "content_tag": ("value", "content"), "user_tag": ("human", "user"),
        "assistant_tag": ("gpt", "assistant"), "observation_tag": ("observation", "tool"),
        "function_tag": ("function_call",), "system_tag": ("system",),
    }  # fmt: skip
    for kind, known in (("columns", columns), ("tags", tags)):
        for name, value in (entry.get(kind) or {}).items():
            if value not in known.get(name, ()):
                return f"{kind} {name}: {value}, which is not read here"
    others = set(entry) - {"file_name", "hf_hub_url", "ms_hub_url", "formatting", "columns", "tags", "subset", "split"}
    if others or entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt"):
        return f"{', '.join(sorted(others)) or entry['formatting']}, which cannot be honoured"
    kind = "alpaca"
    if entry.get("formatting") == "sharegpt":
        kind = COLUMN_OF[(entry.get("columns") or {}).get("messages", "conversations")]
    if entry.get("file_name"):
        return {"data": str(folder / entry["file_name"]), "dataset_format": kind}
    if not entry.get("hf_hub_url"):
        return "neither file_name nor hf_hub_url"
    options = {"data": entry["hf_hub_url"], "dataset_format": kind}
    for name, option in (("subset", "dataset_config"), ("split", "dataset_train_split")):
        if entry.get(name):
            options[option] = entry[name]
    return options


def _liger_of_axolotl(given: dict) -> None:
    """Axolotl's plugin with a switch for each kind of kernel: all of them are our option, some of them are not."""
    plugins = given.get("plugins")
    plugins = plugins if isinstance(plugins, list) else [plugins]
    parts = ("liger_rope", "liger_rms_norm", "liger_swiglu" if "liger_swiglu" in given else "liger_glu_activation")
    if any(str(name).endswith("liger.LigerPlugin") for name in plugins) and all(_true(given.get(p)) for p in parts):
        for name in parts:
            del given[name]
        given["enable_liger_kernel"] = True


def _say_what_differs(given: dict, result: Settled) -> None:
    """Where a file means something else to the tool that it was written for."""
    if given.get("finetuning_type") == "lora" and not {"quantization_bit", "load_in_4bit", "bits"} & set(given):
        result.notes.append(
            "finetuning_type lora: LLaMA-Factory would keep the base in 16 bits, here it is NF4 (load_in_4bit false "
            "for 16 bits)"
        )
    if {"base_model", "micro_batch_size", "sequence_len"} <= set(given) and not {"adapter", "load_in_4bit"} & {
        name for name, value in given.items() if value is not None
    }:
        result.notes.append("no adapter is named: Axolotl would train all weights, here LoRA adapters are trained")
    entries = given.get("datasets")
    entry = entries[0] if isinstance(entries, list) and entries else entries
    if isinstance(entry, dict) and str(entry.get("type", "")).startswith("alpaca"):
        result.notes.append(
            "type alpaca: rows are read as a conversation in the model's chat template; Axolotl writes them into "
            "a prompt of its own"
        )
