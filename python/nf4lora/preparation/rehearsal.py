"""Tries PEFT on a copy of the model without tensors, before the model itself is changed.

PEFT checks its options while it replaces layers, so that an error leaves a model half changed. Here PEFT works on a
copy of the module tree in which every tensor is on the meta device and takes no memory.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nf4lora.compat.torch import bare_copy, buffers_of, children_of, parameters_of
from nf4lora.nn.linear import NF4Linear
from nf4lora.nn.model_tree import replace_layers
from nf4lora.quantization import bitsandbytes_format

if TYPE_CHECKING:
    from peft import LoraConfig


def rehearse(base: nn.Module, blocksizes: Mapping[str, int], double_quant: bool, config: LoraConfig) -> None:
    """Put adapters on a copy of the model without tensors, in which the named layers are packed.

    Raises:
        ValueError: PEFT raises an error, whose text is included.
    """
    from peft import get_peft_model

    copied = skeleton(base)

    def packed(name: str, linear: Any) -> NF4Linear:
        return NF4Linear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            blocksize=blocksizes[name],
            double_quant=double_quant,
            device="meta",
            dtype=linear.weight.dtype,
        )

    def dense(_: str, linear: Any) -> nn.Linear:
        return nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")

    replace_layers(copied, blocksizes, packed)
    # A bitsandbytes layer will be adopted or dequantised; for PEFT both are linear layers.
    of_bnb = [name for name, module in copied.named_modules() if bitsandbytes_format.is_linear4bit(module)]
    replace_layers(copied, of_bnb, dense)
    copied.__dict__.pop("is_loaded_in_4bit", None)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns again when it changes the model itself
        try:
            get_peft_model(copied, copy.deepcopy(config), low_cpu_mem_usage=True)
        except NotImplementedError:  # meta tensors do not support something that PEFT does: no result
            return
        except Exception as error:
            if "meta" in str(error):
                return
            raise ValueError(f"prepare: the options must fit the model, got PEFT's refusal: {error}") from error


def skeleton(model: nn.Module) -> Any:
    """A copy of the module tree with the same classes, attributes and sharing, tensors on meta, and no hooks."""
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}

    def on_meta(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return tensors[id(tensor)]

    def copied(module: nn.Module) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        parameters, buffers = (
            {key: on_meta(tensor) for key, tensor in tensors_of(module).items()}
            for tensors_of in (parameters_of, buffers_of)
        )
        new = modules[id(module)] = bare_copy(module, parameters, buffers)
        for key, child in children_of(module).items():
            children_of(new)[key] = child if child is None else copied(child)
        if "config" in module.__dict__:  # PEFT writes into it
            new.__dict__["config"] = copy.copy(module.__dict__["config"])
        return new

    return copied(model)
