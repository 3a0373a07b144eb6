"""Reader and writer of adapters: PEFT's two files, and a third one that names the base they belong to."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nf4lora import _C  # type: ignore[attr-defined]
from nf4lora.linear import NF4Linear

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

FORMAT_VERSION = 1  # of nf4lora.json
CONFIG_FILE, TENSOR_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "nf4lora.json"
WRAPPED = ("base_layer", "original_module")  # what PEFT calls the layer that it put another around


def nf4_layers(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """The NF4 layers in module order, under the names that they had before PEFT wrapped the model."""
    for name, module in base_of(model).named_modules():
        if isinstance(module, NF4Linear):
            yield base_name(name), module


def base_of(model: nn.Module) -> nn.Module:
    """The model under `torch.compile` and PEFT's wrapper; adapters stay in its layers."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def base_name(name: str) -> str:
    """Name of a module or tensor without what PEFT's layers put into it."""
    return ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part not in WRAPPED)


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the modules and tensors that PEFT put into a model: adapters, and copies of layers trained in full.

    A wrapper is known by its shape, not its class, so that PEFT need not be there.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        kept = next((child for child in WRAPPED if child in module._modules), None)
        if kept is None:
            continue
        start = f"{prefix}." if prefix else ""
        names |= {start + name for name, _ in module.named_parameters(recurse=False)}
        for key, child in module.named_children():
            if key != kept:
                inside = [name for name, _ in child.named_modules(remove_duplicate=False) if name]
                inside += [name for name, _ in child.named_parameters(remove_duplicate=False)]
                inside += [name for name, _ in child.named_buffers(remove_duplicate=False)]
                names |= {start + key} | {f"{start}{key}.{name}" for name in inside}
    return names


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the model as if PEFT had never been there: its own names, no adapter."""
    model = base_of(model)
    of_adapters = adapter_names(model)
    return {base_name(name): tensor for name, tensor in model.state_dict().items() if name not in of_adapters}


def base_hash(model: nn.Module) -> str:
    """SHA-256 of the packed base: name, shape, blocksize and bytes of each NF4 layer, in module order.

    It is the same before and after `prepare`, on every device, and knows nothing of adapters.
    """
    digest = hashlib.sha256()
    for name, layer in nf4_layers(model):
        digest.update(f"{name} {layer.out_features} {layer.in_features} {layer.blocksize}\n".encode())
        for tensor in (layer.weight, layer.weight_absmax, getattr(layer, "weight_nested", None)):
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def save_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Write the active adapter as PEFT's two files, and `nf4lora.json`, which names the base that it was trained on.

    `adapter_config.json` and `adapter_model.safetensors` are what PEFT writes and reads; `nf4lora.json` holds
    format_version, blocksize, double_quant, base_sha256 (see `base_hash`) and the versions of the packages.

    Raises:
        TypeError: model is no PeftModel.
        ValueError: its base is not in NF4, or not exactly one adapter is active; folder is a file.

    >>> save_adapter(model, "out")                                          # doctest: +SKIP
    """
    import peft

    model = getattr(model, "_orig_mod", model)
    name, layers = _one_adapter("save_adapter", model), [layer for _, layer in nf4_layers(model)]
    if not layers:
        raise ValueError("save_adapter: the base must be in NF4, got no NF4 layer; use model.save_pretrained instead")
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"save_adapter: folder must be a folder, got the file {folder}")
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True  # as PEFT writes it
    base_class = type(base_of(model))
    mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    tensors = {
        # safetensors refuses aliases, which tied adapters are
        key: tensor.detach().clone().contiguous()
        for key, tensor in peft.get_peft_model_state_dict(model, adapter_name=name).items()
    }
    about = {
        "format_version": FORMAT_VERSION,
        "blocksize": max(layer.blocksize for layer in layers),  # layers too narrow for it have a smaller one
        "double_quant": layers[0].double_quant,
        "base_sha256": base_hash(model),
        "versions": {
            "nf4lora": _C.__version__,
            **{package.__name__: package.__version__ for package in (torch, transformers, peft)},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder), auto_mapping_dict=mapping if config.task_type is None else None)
    (folder / BASE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Put the adapter of a folder on a model in NF4: on a bare one, or into the adapter of a prepared one.

    The folder is one that `save_adapter`, or plain PEFT (then nothing says what base it belongs to, and only names and
    shapes are checked), has written. The adapter comes back active and trainable, in float32. Everything is checked
    before the model is touched.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: the base is not in NF4, or another one than the adapter was trained on; the prepared model's rank or
            scaling differs; a file is missing, broken or of a newer format; a tensor is missing, left over or of
            another shape.

    >>> model = load_adapter(model, "out")                                  # doctest: +SKIP
    """
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from nf4lora import adapter

    if not isinstance(model, nn.Module):
        raise TypeError(f"load_adapter: model must be an nn.Module, got {type(model).__name__}")
    folder = Path(folder)
    config, tensors, about = _read_folder(folder)
    if next(nf4_layers(model), None) is None:
        raise ValueError(
            "load_adapter: the base must be in NF4, got no NF4 layer; load it with quantization_config=NF4Config(), or "
            "call nf4lora.prepare first"
        )
    if about and about["base_sha256"] != (found := base_hash(model)):
        raise ValueError(
            f"load_adapter: the base must be the one that the adapter in {folder} was trained on, "
            f"{_describe(about)}, got base_sha256 {found[:12]}; to use it on another base nevertheless, call "
            f"peft.PeftModel.from_pretrained(model, {str(folder)!r})"
        )
    adapter.install()
    loaded: Any = getattr(model, "_orig_mod", model)
    if isinstance(loaded, PeftModel):
        name = _one_adapter("load_adapter", loaded)
        for option in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias"):
            ours, theirs = getattr(loaded.peft_config[name], option), getattr(config, option)
            if ours != theirs:
                raise ValueError(
                    f"load_adapter: {option} of the model's adapter must be that of {folder}, {theirs!r}, got {ours!r}"
                )
        _check_tensors(folder, tensors, get_peft_model_state_dict(loaded, adapter_name=name))
    elif adapter_names(loaded):
        raise ValueError(
            f"load_adapter: a model with PEFT's layers must come as its PeftModel, got the {type(loaded).__name__} "
            f"inside; pass what prepare or get_peft_model returned, or call unload() on that first"
        )
    else:
        name, trainable = "default", {parameter: parameter.requires_grad for parameter in loaded.parameters()}
        base_id, config.base_model_name_or_path = config.base_model_name_or_path, None  # PEFT would take this model's
        config.inference_mode = False
        try:
            wrapped = get_peft_model(loaded, config)
        except ValueError as error:
            raise ValueError(f"load_adapter: the adapter in {folder} must fit the model: {error}") from error
        try:
            _check_tensors(folder, tensors, get_peft_model_state_dict(wrapped, adapter_name=name))
        except ValueError:
            wrapped.unload()
            for parameter, required in trainable.items():
                parameter.requires_grad_(required)
            raise
        loaded = wrapped
        loaded.peft_config[name].base_model_name_or_path = base_id
    set_peft_model_state_dict(loaded, tensors, adapter_name=name)
    return loaded


def _one_adapter(who: str, model: Any) -> str:
    """Name of the only active adapter."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(f"{who}: model must be a PeftModel, as nf4lora.prepare returns it, got {type(model).__name__}")
    if len(model.active_adapters) != 1:
        raise ValueError(f"{who}: exactly one adapter must be active, got {model.active_adapters}; call set_adapter")
    return model.active_adapters[0]


def _describe(about: Mapping[str, Any]) -> str:
    return (
        f"base_sha256 {about['base_sha256'][:12]} (blocksize {about.get('blocksize')}, "
        f"double_quant {about.get('double_quant')})"
    )


def _read_folder(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Any]]:
    """The three files of an adapter; the third may be absent, and is {} then."""
    from peft import LoraConfig

    for file in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"load_adapter: folder must hold {file}, got {folder} without it")
    fields = _read_json(folder / CONFIG_FILE)
    if fields.get("peft_type") != "LORA":
        raise ValueError(
            f"load_adapter: peft_type in {folder / CONFIG_FILE} must be 'LORA', got {fields.get('peft_type')!r}"
        )
    about = _read_json(folder / BASE_FILE) if (folder / BASE_FILE).is_file() else {}
    if about:
        version = about.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"load_adapter: format_version in {folder / BASE_FILE} must be at most {FORMAT_VERSION}, got "
                f"{version!r}; it was written by a newer nf4lora: pip install --upgrade nf4lora"
            )
        if not isinstance(about.get("base_sha256"), str):
            raise ValueError(f"load_adapter: {folder / BASE_FILE} must hold base_sha256, got {sorted(about)}")
    try:
        tensors = load_file(folder / TENSOR_FILE)
    except SafetensorError as error:
        raise ValueError(
            f"load_adapter: {folder / TENSOR_FILE} must be a whole safetensors file, got one that is truncated or "
            f"corrupt ({error})"
        ) from error
    return LoraConfig.from_pretrained(str(folder)), tensors, about


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load_adapter: {path} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"load_adapter: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names and shapes; otherwise the first three that differ."""
    file = folder / TENSOR_FILE
    for names, problem in (
        (expected.keys() - tensors.keys(), "must hold every tensor of the adapter, got none for"),
        (tensors.keys() - expected.keys(), "must hold nothing that has no place in the model, got"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"load_adapter: {file} {problem} {shown}")
    for name in sorted(expected):
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"load_adapter: {name} in {file} must be {list(expected[name].shape)}, got "
                f"{list(tensors[name].shape)}; the adapter belongs to another model or has another rank"
            )
