"""The three files of an adapter's folder: their names, and the function that reads and checks them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nf4lora.adapters.base_identity import check_identity

if TYPE_CHECKING:
    from peft import LoraConfig

FORMAT_VERSION = 1  # of nf4lora.json
CONFIG_FILE, TENSOR_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "nf4lora.json"


def read_folder(folder: Path) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Any]]:
    """The contents of an adapter's three files; {} where the third is absent."""
    from peft import LoraConfig

    for file in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"load_adapter: folder must hold {file}, got {folder} without it")
    fields = _read_json(folder / CONFIG_FILE)
    if fields.get("peft_type") != "LORA":
        raise ValueError(
            f"load_adapter: peft_type in {folder / CONFIG_FILE} must be 'LORA', got {fields.get('peft_type')!r}"
        )
    record = _read_record(folder / BASE_FILE) if os.path.lexists(folder / BASE_FILE) else {}
    try:
        tensors = load_file(folder / TENSOR_FILE)
    except SafetensorError as error:
        raise ValueError(
            f"load_adapter: {folder / TENSOR_FILE} must be a whole safetensors file, got one that is truncated or "
            f"corrupt ({error})"
        ) from error
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"load_adapter: {folder / CONFIG_FILE} must describe a LoRA adapter, got {error}") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            problem = "NaN or Inf" if tensor.is_floating_point() else tensor.dtype
            raise ValueError(f"load_adapter: {key} in {folder / TENSOR_FILE} must hold finite numbers, got {problem}")
    # Where an embedding has an adapter, PEFT saves the embedding's weight too, under its name inside the wrapper.
    inside = ".base_layer.weight"
    tensors = {
        key.replace(inside, ".weight") if key.endswith(inside) else key: tensor for key, tensor in tensors.items()
    }
    return config, tensors, record


def _read_record(path: Path) -> dict[str, Any]:
    """The contents of nf4lora.json, with the types of its entries checked."""
    record = _read_json(path)
    version = record.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"load_adapter: {path} must hold format_version, a number from 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"load_adapter: format_version in {path} must be at most {FORMAT_VERSION}, got {version}; it was written "
            f"by a newer nf4lora: pip install --upgrade nf4lora"
        )
    if not isinstance(record.get("base_sha256"), str) or not record["base_sha256"]:
        raise ValueError(f"load_adapter: {path} must hold base_sha256, a text, got {record.get('base_sha256')!r}")
    if "base" in record and (wrong := check_identity(record["base"])):
        raise ValueError(f"load_adapter: base in {path} must hold {wrong}")
    names = record.get("with_base", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"load_adapter: with_base in {path} must be a list of names, got {names!r}")
    return record


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"load_adapter: {path} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"load_adapter: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def as_json(record: dict[str, Any]) -> str:
    """The text of nf4lora.json: indented, with one line for each layer of the base."""
    base = record.pop("base")
    parts = []
    for part, entries in base.items():
        lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        parts.append(f'    "{part}": {{\n{lines}\n    }}')
    text = json.dumps(record, indent=2).removesuffix("\n}")
    return f'{text},\n  "base": {{\n' + ",\n".join(parts) + "\n  }\n}\n"
