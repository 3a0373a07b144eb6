"""An adapter of one class on another class of the same checkpoint: the text part of a multimodal model, or the whole.

`Qwen3_5ForCausalLM` has `model.layers.0`, `Qwen3_5ForConditionalGeneration` has `model.language_model.layers.0`; both
read the same checkpoint. What is before the common end of a name is exchanged, where that makes all names fit.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from nf4lora.nn.model_tree import adapter_names, base_name, base_of

if TYPE_CHECKING:
    from peft import LoraConfig

ROOT = "base_model.model."  # before every key of PEFT's files
Prefixes = dict[str, str]  # prefix in the model by prefix in the file


def module_of(key: str) -> str:
    """The base module that a tensor of an adapter's file belongs to, by its name in the base."""
    parts = key.removeprefix(ROOT).split(".")
    for number, part in enumerate(parts):
        if part.startswith("lora_") or part in ("token_adapter", "base_layer"):
            return ".".join(parts[:number])
    return ".".join(parts[:-1])


def find_prefixes(keys: Iterable[str], others: Iterable[str], model: nn.Module) -> Prefixes:
    """Which prefixes of the file's names have to be exchanged to find them in the model; none where all are there.

    Args:
        keys: tensors of the adapter, which must all find their module
        others: modules of the base that the file names; they decide where several places fit

    Returns:
        nothing too where no exchange fits: the error then speaks of the names as they are
    """
    base = base_of(model)
    not_base = adapter_names(base)
    there = {base_name(name) for name, _ in base.named_modules() if name not in not_base}
    wanted = {module_of(key) for key in keys}
    prefixes: Prefixes = {}
    while missing := sorted(name for name in wanted if renamed(name, prefixes) not in there):
        found = _exchange(missing[0], missing, others, there, _decoder_name(base))
        if found is None:
            return {}
        prefixes |= found
    return prefixes


def _exchange(
    name: str, missing: list[str], others: Iterable[str], there: Collection[str], decoder: str
) -> Prefixes | None:
    parts = name.split(".")
    for cut in range(1, len(parts)):
        old, end = ".".join(parts[:cut]), ".".join(parts[cut:])
        places = [each.removesuffix(end).rstrip(".") for each in there if each == end or each.endswith(f".{end}")]
        concerned = [each for each in (*missing, *others) if each.startswith(f"{old}.")]
        fitting = [new for new in places if all(renamed(each, {old: new}) in there for each in concerned)]
        if len(fitting) > 1:  # an encoder of images may name its layers as the text part does
            fitting = [new for new in fitting if new == decoder]
        if len(fitting) == 1:
            return {old: fitting[0]}
    return None


def _decoder_name(base: nn.Module) -> str:
    find: Any = getattr(base, "get_decoder", None)
    decoder = find() if callable(find) else None
    return next((base_name(name) for name, module in base.named_modules() if module is decoder), "")


def renamed(name: str, prefixes: Prefixes) -> str:
    """A module's or tensor's name with its prefix exchanged."""
    for old, new in prefixes.items():
        if name == old or name.startswith(f"{old}."):
            return (new + name[len(old) :]).lstrip(".")
    return name


def renamed_tensors(tensors: Mapping[str, Any], prefixes: Prefixes) -> dict[str, Any]:
    """The adapter's tensors under the keys that they have on the model."""
    return {ROOT + renamed(key.removeprefix(ROOT), prefixes): tensor for key, tensor in tensors.items()}


def renamed_config(config: LoraConfig, tensors: Iterable[str], prefixes: Prefixes) -> LoraConfig:
    """The configuration that puts adapters where the file has tensors, and nowhere else.

    A list of ends ("q_proj") may match the layers of an image encoder too, so the layers are named in full.
    """
    config = copy.copy(config)
    layers = {module_of(key) for key in tensors if ".lora_" in key and ".base_layer." not in key}
    if layers and not config.target_parameters:
        config.target_modules = layers  # type: ignore[assignment]  # PEFT takes a set too
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for option in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
        value = getattr(config, option)
        if isinstance(value, dict):
            setattr(config, option, {renamed(key, prefixes): each for key, each in value.items()})
    if isinstance(config.modules_to_save, (list, set, tuple)):
        config.modules_to_save = [renamed(name, prefixes) for name in config.modules_to_save]
    return config
