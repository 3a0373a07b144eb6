"""Checks of a checkpoint: of its files before anything is read, and of the model once it is loaded.

transformers only warns of a missing tensor and initialises it at random. In the layers of a frozen model that is never
right.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from nf4lora.adapters.new_weights import modules_of, task_heads
from nf4lora.compat.transformers import computed_by_model, was_loaded
from nf4lora.nn.linear import NF4Linear
from nf4lora.words import dtype_name, listed

FLOATS = ("F64", "F32", "F16", "BF16")


def check_files(files: list[str], packed_file: bool) -> None:
    """Refuse a safetensors file that is cut off, or packed where 16 bits are expected, before anything is read.

    Raises:
        ValueError: naming the file and the tensors.
    """
    for path in files:
        if not path.endswith(".safetensors"):
            continue
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            is_complete = size >= 8 and start <= size
            try:
                header = json.loads(file.read(start - 8)) if is_complete else {}
            except (ValueError, RecursionError):
                is_complete = False
        if not is_complete:
            raise ValueError(
                f"NF4Config: {path} must be a safetensors file, got {size} bytes and no whole header; download again"
            )
        if isinstance(header, dict):
            header.pop("__metadata__", None)
        if not isinstance(header, dict) or not all(map(_is_entry, header.values())):
            raise ValueError(
                f"NF4Config: {path} must have a safetensors header, which gives each tensor its dtype, shape and "
                f"data_offsets, got other JSON; download again"
            )
        cut = [name for name, tensor in header.items() if start + tensor["data_offsets"][1] > size]
        if cut:
            raise ValueError(
                f"NF4Config: {path} must hold {listed(cut)}, got a file cut off at {size} bytes; download again"
            )
        packed = [name for name in header if name.endswith((".weight_absmax", ".weight_nested"))]
        packed += [name for name in header if f"{name}_absmax" in header]
        # transformers would cast these to integers while it loads them
        rounded = [name for name in packed if packed_file and header[name]["dtype"] in FLOATS]
        if rounded:
            raise ValueError(
                f"NF4Config: {listed(rounded)} must hold integers (codes, or the bits of scales), "
                f"got {header[rounded[0]]['dtype']} in {path}"
            )
        foreign = [name for name, t in header.items() if name.endswith(".weight") and t["dtype"] not in FLOATS]
        if foreign and not packed_file:
            raise ValueError(
                f"NF4Config: {listed(foreign)} must be in 16 or 32 bits, got {header[foreign[0]]['dtype']} in {path}; "
                f"the checkpoint is quantised, and its config.json does not say how"
            )


def _is_entry(tensor: Any) -> bool:
    """Whether this is a valid entry of a tensor in a safetensors header."""

    def are_integers(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(number, int) for number in value)

    if not isinstance(tensor, dict) or not isinstance(tensor.get("dtype"), str):
        return False
    offsets = tensor.get("data_offsets")
    return are_integers(tensor.get("shape")) and are_integers(offsets) and len(offsets) == 2  # type: ignore[arg-type]


def check_loaded(
    model: Any, shapes: dict[str, torch.Size], packed_file: bool, new: Container[str] = frozenset()
) -> None:
    """Refuse a model with a tensor that is missing or of the wrong kind, or with a scale of a packed file that is NaN.

    For a missing parameter that belongs to no layer there is a warning instead.

    Args:
        shapes: of all parameters that are not packed, by the model's config
        new: parameters that the checkpoint cannot hold, since it was saved from a model of another class

    Raises:
        ValueError: naming the tensors.
    """
    wrong: dict[str, str] = {}
    packed: set[str] = set()
    for prefix, layer in model.named_modules():
        if not isinstance(layer, NF4Linear):
            continue
        likeness = NF4Linear(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            blocksize=layer.blocksize,
            double_quant=layer.double_quant,
            device="meta",
        )
        for key, expected in likeness.named_parameters():
            name, loaded = f"{prefix}.{key}", layer.get_parameter(key)
            packed.add(name)
            if not was_loaded(loaded):
                wrong[name] = "nothing"
            elif loaded.shape != expected.shape or (key != "bias" and loaded.dtype != expected.dtype):
                wrong[name] = f"{describe(loaded)} for {describe(expected)}"
        largest = layer.weight_nested if layer.double_quant else layer.weight_absmax
        if packed_file and not wrong and not largest.is_meta and not largest.view(torch.float32).isfinite().all():
            wrong[f"{prefix}.weight_{'nested' if layer.double_quant else 'absmax'}"] = "NaN or Inf"
    is_computed = computed_by_model(model)
    # Two kinds of parameters may be missing, which transformers initialises with a warning: those that the saved class
    # does not have, and those of a task's head, which may have had another number of classes.
    heads = tuple(f"{name}." for name in task_heads(model))
    all_expected = model.base_model is model or type(model).__name__ in (model.config.architectures or [])
    missing: set[str] = set()
    for name, parameter in model.named_parameters():
        in_saved_class = all_expected or name.startswith(f"{model.base_model_prefix}.")
        expected_in_file = in_saved_class and not name.startswith(heads)
        if name in packed:
            continue
        if expected_in_file and name not in new and not was_loaded(parameter):
            if not is_computed(name):
                missing.add(name)
        elif name in shapes and parameter.shape != shapes[name]:  # transformers until 5.22 lets this pass
            wrong[name] = f"{describe(parameter)} for shape {list(shapes[name])}"
    # A parameter that belongs to no layer (such as the vector that training masks with) is often missing in a file.
    _, alone = modules_of(model, missing)
    wrong |= dict.fromkeys(sorted(missing.difference(alone)), "nothing")
    if wrong:
        first, problem = next(iter(wrong.items()))
        more = f" (and {len(wrong) - 1} more: {listed(list(wrong)[1:])})" if len(wrong) > 1 else ""
        advice = "it is damaged, or its config.json is another's"
        if first in packed and not packed_file:
            advice = f"name {first.rpartition('.')[0]} in modules_to_not_convert if it is meant to be new"
        raise ValueError(
            f"NF4Config: {first} must be in the checkpoint as its config says, got {problem}{more}; {advice}"
        )
    if alone:
        warnings.warn(
            f"NF4Config: {listed(alone)} must be in the checkpoint as its config says, got nothing; transformers has "
            f"initialised it. Ignore this if the model computes without it",
            stacklevel=2,
        )


def describe(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
