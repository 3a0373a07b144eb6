"""Loading an adapter of one class into another class of the same checkpoint: a multimodal model and its text part.

`Qwen3_5ForCausalLM` has `model.layers.0`, `Qwen3_5ForConditionalGeneration` has `model.language_model.layers.0`; both
read the same checkpoint. So the prefix of each name in the adapter's file is exchanged, if then all names fit.
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
    """The name of the base module that a tensor of an adapter's file belongs to."""
    parts = key.removeprefix(ROOT).split(".")
    for number, part in enumerate(parts):
        if part.startswith("lora_") or part in ("token_adapter", "base_layer"):
            return ".".join(parts[:number])
    return ".".join(parts[:-1])


def find_prefixes(keys: Iterable[str], others: Iterable[str], model: nn.Module) -> Prefixes:
    """The prefixes of the file's names that must be exchanged to find all modules in the model.

    Args:
        keys: tensors of the adapter, each of which must find its module
        others: modules of the base that the file names; they decide where several exchanges fit

    Returns:
        empty where all modules are found already, and where no exchange fits: errors then show the file's own names
    """
    base = base_of(model)
    not_base = adapter_names(base)
    modules = {base_name(name) for name, _ in base.named_modules() if name not in not_base}
    wanted = {module_of(key) for key in keys}
    prefixes: Prefixes = {}
    while missing := sorted(name for name in wanted if renamed(name, prefixes) not in modules):
        exchange = _exchange(missing[0], missing, others, modules, _decoder_name(base))
        if exchange is None:
            return {}
        prefixes |= exchange
    return prefixes


def _exchange(
    name: str, missing: list[str], others: Iterable[str], modules: Collection[str], decoder: str
) -> Prefixes | None:
    parts = name.split(".")
    for cut in range(1, len(parts)):
        old, end = ".".join(parts[:cut]), ".".join(parts[cut:])
        places = [
            module.removesuffix(end).rstrip(".") for module in modules if module == end or module.endswith(f".{end}")
        ]
        concerned = [module for module in (*missing, *others) if module.startswith(f"{old}.")]
        fitting = [new for new in places if all(renamed(module, {old: new}) in modules for module in concerned)]
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
    """The name of a module or tensor with its prefix exchanged."""
    for old, new in prefixes.items():
        if name == old or name.startswith(f"{old}."):
            return (new + name[len(old) :]).lstrip(".")
    return name


def renamed_tensors(tensors: Mapping[str, Any], prefixes: Prefixes) -> dict[str, Any]:
    """The adapter's tensors under the keys that the model uses."""
    return {ROOT + renamed(key.removeprefix(ROOT), prefixes): tensor for key, tensor in tensors.items()}


def renamed_config(config: LoraConfig, tensors: Iterable[str], prefixes: Prefixes) -> LoraConfig:
    """The configuration with adapters on exactly the modules for which the file has tensors.

    A list of endings ("q_proj") may also match the layers of an image encoder, so the layers are named in full.
    """
    config = copy.copy(config)
    layers = {module_of(key) for key in tensors if ".lora_" in key and ".base_layer." not in key}
    if layers and not config.target_parameters:
        config.target_modules = layers  # type: ignore[assignment]  # PEFT takes a set too
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for option in ("rank_pattern", "alpha_pattern", "trainable_token_indices"):
        value = getattr(config, option)
        if isinstance(value, dict):
            setattr(config, option, {renamed(key, prefixes): entry for key, entry in value.items()})
    if isinstance(config.modules_to_save, (list, set, tuple)):
        config.modules_to_save = [renamed(name, prefixes) for name in config.modules_to_save]
    return config
