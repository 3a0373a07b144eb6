"""Saving and loading adapters: PEFT's two files, and a third one that identifies the base they belong to."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from nf4lora import _C
from nf4lora.adapters.base_identity import base_hash, differences, identity, other_parameters
from nf4lora.adapters.folder import BASE_FILE, FORMAT_VERSION, TENSOR_FILE, as_json, read_folder
from nf4lora.adapters.new_weights import grown_vocabulary, new_parameters
from nf4lora.adapters.renaming import ROOT, Prefixes, find_prefixes, renamed, renamed_config, renamed_tensors
from nf4lora.adapters.whole_files import written_whole
from nf4lora.compat.peft import get_peft_model
from nf4lora.compat.torch import uncompiled
from nf4lora.memory import heap  # type: ignore[attr-defined]
from nf4lora.nn.model_tree import (
    WRAPPED,
    adapter_names,
    base_name,
    base_of,
    base_state_dict,
    nf4_layers,
    token_layers,
    unchanged_on_failure,
)
from nf4lora.words import listed

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

HELD = "held_by_adapter"  # marks a parameter of the base that came from an adapter's file, to be saved again with it
# Fields of a LoraConfig that may differ between a file and the model. All others must be equal, new ones of a later
# PEFT included.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
    *("peft_type", "task_type"),
    # how an adapter is initialised: loading replaces the values
    *("init_lora_weights", "corda_config", "eva_config", "loftq_config", "lora_ga_config", "ensure_weight_tying"),
    "lora_dropout",  # changes training, not what the adapter computes
    # which modules have adapters: the names of the tensors in the file say that
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    "target_parameters",
}

__all__ = [
    "WRAPPED",
    "adapter_names",
    "base_hash",
    "base_name",
    "base_of",
    "base_state_dict",
    "load_adapter",
    "nf4_layers",
    "save_adapter",
]


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Write the active adapter as PEFT's two files, and `nf4lora.json`, which identifies the base it was trained on.

    `adapter_config.json` and `adapter_model.safetensors` are what PEFT writes and reads. `nf4lora.json` holds
    format_version, blocksize, double_quant, base_sha256 (see `base_hash`), base (see `base_identity`), with_base (the
    base's parameters that the adapter file holds), and the versions of the packages.

    Parameters of the base that its checkpoint cannot provide go into the adapter's file: those that are trained, and
    those that no checkpoint held, such as the new head of a classifier (with a warning if that head is not trained).
    Either all three files are written or none, with the mode that the umask gives.

    Raises:
        TypeError: model is not a PeftModel.
        ValueError: its base is not in NF4, or not exactly one adapter is active; folder is a file; the model is sharded
            (FSDP2, tensor parallelism).

    >>> save_adapter(model, "out")                                          # doctest: +SKIP
    """
    import peft

    model = uncompiled(model)
    name, layers = _one_adapter("save_adapter", model), [layer for _, layer in nf4_layers(model)]
    if not layers:
        raise ValueError("save_adapter: the base must be in NF4, got no NF4 layer; use model.save_pretrained instead")
    _check_whole("save_adapter", model)
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"save_adapter: folder must be a folder, got the file {folder}")
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True  # as PEFT writes it
    base = base_of(model)
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    tensors = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    parameters = other_parameters(model)
    tensors |= {ROOT + key: parameters[key] for key in _only_here(base, parameters, {*map(base_name, tensors)})}
    in_file = {id(parameters[key]) for key in parameters.keys() & {*map(base_name, tensors)}}
    # Tied parameters are listed under each of their names.
    with_base = sorted(key for key, parameter in parameters.items() if id(parameter) in in_file)
    record = {
        "format_version": FORMAT_VERSION,
        "blocksize": max(layer.blocksize for layer in layers),  # layers too narrow for it have a smaller one
        "double_quant": layers[0].double_quant,
        "base_class": type(base).__name__,
        "base_sha256": base_hash(model),
        "base": identity(model, left_out=with_base),
        "with_base": with_base,
        "versions": {
            "nf4lora": _C.__version__,
            **{package.__name__: package.__version__ for package in (torch, transformers, peft)},
        },
    }
    with written_whole(folder) as stage:
        # copies, because safetensors refuses tensors that share memory, as those of tied adapters do
        copies = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
        save_file(copies, stage / TENSOR_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(stage), auto_mapping_dict=mapping if config.task_type is None else None)
        (stage / BASE_FILE).write_text(as_json(record), encoding="utf-8")


def _check_whole(who: str, model: nn.Module) -> None:
    """Refuse a model of which this process holds only shards (DTensor): files and hashes need all of it."""
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        cure = (
            "load the adapter before fully_shard"
            if who == "load_adapter"
            else "in every process call state = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True, cpu_offload=True)), then in the first one "
            "model.save_pretrained(folder, state_dict=state): load_adapter reads that"
        )
        raise ValueError(f"{who}: the model must be whole in this process, got one in shards (DTensor); {cure}")


def _only_here(base: Any, parameters: Mapping[str, nn.Parameter], in_file: set[str]) -> list[str]:
    """Names of the base's parameters that are neither in its checkpoint nor among the adapter's tensors."""
    drawn, resized = {id(base.get_parameter(name)) for name in new_parameters(base)}, _resized(base)
    only_here: dict[int, str] = {}
    untrained = []
    for name, parameter in parameters.items():
        if name in in_file or id(parameter) in only_here:  # tied parameters once
            continue
        new = id(parameter) in drawn
        if new or parameter.requires_grad or id(parameter) in resized or hasattr(parameter, HELD):
            only_here[id(parameter)] = name
            untrained += [name] if new and not parameter.requires_grad else []
    if untrained:
        layers = {base_name(name) for name, module in base.named_modules() if not list(module.children())}
        within = {name.rpartition(".")[0] for name in untrained} & layers
        modules = sorted({name.rpartition(".")[2] for name in within})
        advice = f". To train it: modules_to_save={modules}" if modules else ""
        warnings.warn(
            f"save_adapter: {listed(untrained)} was in no checkpoint, was drawn at random and is not trained; it is "
            f"saved with the adapter{advice}",
            stacklevel=3,
        )
    return list(only_here.values())


def _resized(base: Any) -> set[int]:
    """The `id` of each embedding weight, if tokens were added or removed since the checkpoint was made."""
    if grown_vocabulary(base) is None:
        return set()
    weights = [getattr(layer, "weight", None) for layer in token_layers(base)]
    return {id(weight) for weight in weights if isinstance(weight, nn.Parameter)}


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Load the adapter in a folder into a model in NF4, which may be a bare model or one that `prepare` returned.

    The folder was written by `save_adapter`, or by PEFT alone: then its base is unknown, and only names and shapes are
    checked. The loaded adapter is active, trainable and in float32. A bare model comes back in evaluation mode, as from
    `PeftModel.from_pretrained`: call `model.train()` to continue training. A prepared model keeps its mode. An adapter
    of a text model also loads into the multimodal model that contains it, and the other way round; a warning then names
    the exchanged prefixes. Everything is checked before the model is changed.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: the base is not in NF4, or not the one that the adapter was trained on; the prepared model's adapter
            has another value of an option that changes what it computes; a file is missing, broken or of a newer
            format; a tensor is missing, has no place in the model or has another shape.

    >>> model = load_adapter(model, "out")                                  # doctest: +SKIP
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    from nf4lora.adapters import lora_layer

    if not isinstance(model, nn.Module):
        raise TypeError(f"load_adapter: model must be an nn.Module, got {type(model).__name__}")
    folder = Path(folder)
    config, tensors, record = read_folder(folder)
    if next(nf4_layers(model), None) is None:
        raise ValueError(
            "load_adapter: the base must be in NF4, got no NF4 layer; load it with quantization_config=NF4Config(), or "
            "call nf4lora.prepare first"
        )
    _check_whole("load_adapter", model)
    saved = record.get("base") or {"packed": {}, "weights": {}}
    prefixes: Prefixes = {}
    if not config.layer_replication:
        prefixes = find_prefixes(tensors, saved["packed"], model)
    if prefixes:
        tensors = renamed_tensors(tensors, prefixes)
        config = renamed_config(config, tensors, prefixes)
    _check_base(model, folder, record, config, prefixes)
    lora_layer.install()
    loaded: Any = uncompiled(model)
    if isinstance(loaded, PeftModel):
        name = _one_adapter("load_adapter", loaded)
        _check_options(folder, loaded.peft_config[name], config)  # type: ignore[arg-type]
        expected = get_peft_model_state_dict(loaded, adapter_name=name, save_embedding_layers=False)
        _check_tensors(folder, tensors, expected, _not_trained_in_full(loaded, config))
    elif adapter_names(loaded):
        raise ValueError(
            f"load_adapter: a model with PEFT's layers must come as its PeftModel, got the {type(loaded).__name__} "
            f"inside; pass what prepare or get_peft_model returned, or call unload() on that first"
        )
    else:
        name, loaded = "default", _wrapped(loaded, folder, config, tensors)
        loaded.eval()
    if prefixes:
        exchanged = ", ".join(f"{old or 'the top'} is {new or 'the top'} here" for old, new in prefixes.items())
        warnings.warn(
            f"load_adapter: the adapter in {folder} was trained on {record.get('base_class', 'another class')} and is "
            f"put on {type(base_of(loaded)).__name__}, whose modules have other names: {exchanged}",
            stacklevel=2,
        )
    parameters = other_parameters(loaded)
    for key in tensors.keys() & {ROOT + weight_name for weight_name in parameters}:
        parameter = parameters[key.removeprefix(ROOT)]
        with torch.no_grad():
            parameter.copy_(tensors.pop(key))
        setattr(parameter, HELD, True)
    set_peft_model_state_dict(loaded, tensors, adapter_name=name)
    heap.keep_small(base_of(loaded))
    return loaded


def _wrapped(bare: nn.Module, folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> PeftModel:
    """A bare model with the adapter's layers, for which the tensors fit; after an error the model is as before."""
    from peft import get_peft_model_state_dict

    layers = getattr(getattr(bare, "config", None), "num_hidden_layers", None)  # layer_replication changes it
    base_id, config.base_model_name_or_path = config.base_model_name_or_path, None  # else PEFT writes this model's
    config.inference_mode = False
    try:
        with unchanged_on_failure(bare):
            try:
                wrapped = get_peft_model(bare, config)
            except (ValueError, TypeError, AttributeError, KeyError, re.error) as error:
                raise ValueError(f"load_adapter: the adapter in {folder} must fit the model: {error}") from error
            expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            _check_tensors(folder, tensors, expected, _not_trained_in_full(wrapped, config))
    except BaseException:
        if layers is not None:
            bare.config.num_hidden_layers = layers  # type: ignore[union-attr]
        raise
    wrapped.peft_config["default"].base_model_name_or_path = base_id
    return wrapped


def _not_trained_in_full(model: nn.Module, config: LoraConfig) -> dict[str, nn.Parameter]:
    """The base's parameters that an adapter's file may hold: those outside of the modules that it trains in full."""
    ends = tuple(f".{name}." for name in config.modules_to_save or ())
    return {
        name: parameter
        for name, parameter in other_parameters(model).items()
        if not any(end in f".{name.rpartition('.')[0]}." for end in ends)
    }


def _check_base(
    model: nn.Module, folder: Path, record: Mapping[str, Any], config: LoraConfig, prefixes: Prefixes
) -> None:
    """Refuse a base that differs from the one that the adapter was trained on, and say how."""
    if not record:
        return
    who = (
        f"load_adapter: the base must be the one that the adapter in {folder} was trained on, {_describe(record)}, got"
    )
    advice = f"to use it on another base nevertheless, call peft.PeftModel.from_pretrained(model, {str(folder)!r})"
    if "base" not in record:  # a folder of an older nf4lora
        if record["base_sha256"] != (actual := base_hash(model)):
            raise ValueError(
                f"{who} base_sha256 {actual[:12]}; the folder is of an older nf4lora, which kept a hash of codes and "
                f"scales and nothing to compare scales by; {advice}"
            )
        return
    saved = {part: dict(entries) for part, entries in record["base"].items()}
    if prefixes:  # a model of another class: compare only what both have
        names = {*dict(nf4_layers(model)), *other_parameters(model)}
        for entries in saved.values():
            for name in [name for name in entries if renamed(name, prefixes) == name and name not in names]:
                del entries[name]
    modules = {*saved["packed"], *(name.rpartition(".")[0] for name in saved["weights"])}
    rename = {name: renamed(name, prefixes) for name in modules}
    wrong = differences(saved, model, rename, complete=not prefixes and not config.layer_replication)
    if wrong:
        raise ValueError(f"{who} base_sha256 {base_hash(model)[:12]}: {listed(wrong)}; {advice}")


def _check_options(folder: Path, current: LoraConfig, loaded: LoraConfig) -> None:
    """Refuse a different value of any option that changes what the adapter computes."""
    for option in [field.name for field in fields(loaded) if field.name not in HARMLESS]:
        current_value, loaded_value = getattr(current, option, None), getattr(loaded, option)
        if _comparable(current_value) != _comparable(loaded_value):
            raise ValueError(
                f"load_adapter: {option} of the model's adapter must be that of {folder}, {loaded_value!r}, "
                f"got {current_value!r}"
            )


def _comparable(value: Any) -> Any:
    """A form of the value that is equal for equal meanings: {} and None, or sets, which files write in any order."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict) and set(value) == {"embed_tokens"}:
        value = value["embed_tokens"]  # what a list of trainable_token_indices means
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        value = [_comparable(item) for item in value]
    return value if value or (value == 0 and value is not False) else None


def _one_adapter(who: str, model: Any) -> str:
    """The name of the adapter, if exactly one is active."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(f"{who}: model must be a PeftModel, as nf4lora.prepare returns it, got {type(model).__name__}")
    if len(model.active_adapters) != 1:
        raise ValueError(f"{who}: exactly one adapter must be active, got {model.active_adapters}; call set_adapter")
    return model.active_adapters[0]


def _describe(record: Mapping[str, Any]) -> str:
    return (
        f"base_sha256 {record['base_sha256'][:12]} (blocksize {record.get('blocksize')}, "
        f"double_quant {record.get('double_quant')})"
    )


def _check_tensors(
    folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    """Refuse tensors with other names or shapes than expected; parameters of the base may be among them."""
    file = folder / TENSOR_FILE
    expected = {ROOT + key: base[key] for key in base if ROOT + key in tensors} | dict(expected)
    for names, problem in (
        (expected.keys() - tensors.keys(), "must hold every tensor of the adapter, got none for"),
        (tensors.keys() - expected.keys(), "must hold only tensors that have a place in the model, got"),
    ):
        if names:
            raise ValueError(f"load_adapter: {file} {problem} {listed(sorted(names))}")
    for name in sorted(expected):
        if tensors[name].shape != expected[name].shape:
            hint = "the adapter belongs to another model or has another rank"
            if "embed" in name or "lm_head" in name:
                hint = f"call model.resize_token_embeddings({tensors[name].shape[0]}) first if tokens were added"
            raise ValueError(
                f"load_adapter: {name} in {file} must be {list(expected[name].shape)}, got "
                f"{list(tensors[name].shape)}; {hint}"
            )
