"""Bring a loaded model to NF4 in place, layer by layer: from 16 or 32 bits, or from what bitsandbytes packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from nf4lora import bitsandbytes
from nf4lora.adapter_files import adapter_names, base_name, nf4_layers
from nf4lora.config import METHOD, NF4Config
from nf4lora.linear import BLOCKSIZES, COMPUTE_DTYPES, NF4Linear, blocksize_for
from nf4lora.quantizer import layers_to_pack
from nf4lora.report import report


def check_packable(base: nn.Module) -> None:
    """Refuse what `pack` cannot bring to NF4, before anything is changed.

    Raises:
        ValueError: no torch.nn.Linear, weights that are not in memory, or another quantisation.
    """
    if not any(isinstance(module, nn.Linear) for module in base.modules()):
        raise ValueError(
            f"prepare: model must have torch.nn.Linear layers to pack, got {type(base).__name__} with none"
        )
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(
            "prepare: the weights must be in memory, got meta tensors; load the model without disk offload"
        )
    if any(bitsandbytes.is_linear4bit(module) for module in base.modules()):
        return
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", METHOD)
    if method != METHOD:
        raise ValueError(
            f"prepare: model must be in 16 or 32 bits, in NF4 or in bitsandbytes' nf4, got one quantised with "
            f"{getattr(method, 'value', method)}; load it without quantization_config"
        )


def check_same_packing(base: nn.Module, config: NF4Config) -> None:
    """Refuse options that differ from how a model is packed already; one in 16 or 32 bits passes.

    Raises:
        ValueError: naming the option, the layer and both values.
    """
    for name, module in base.named_modules():
        if isinstance(module, NF4Linear):
            found: dict[str, Any] = {"blocksize": module.blocksize, "double_quant": module.double_quant}
            found["compute_dtype"] = module.compute_dtype
        elif bitsandbytes.is_linear4bit(module):
            state: Any = module.weight.quant_state
            found = {"blocksize": state.blocksize, "double_quant": state.nested}
        else:
            continue
        blocksize = blocksize_for(module.in_features, config.blocksize)  # type: ignore[arg-type]
        asked: dict[str, Any] = {"blocksize": blocksize, "double_quant": config.double_quant}
        asked |= {"compute_dtype": config.compute_dtype} if config.compute_dtype is not None else {}
        for option in asked.keys() & found.keys():
            if asked[option] != found[option]:
                raise ValueError(
                    f"prepare: {option} must be what the model is packed with, {found[option]} in {base_name(name)}, "
                    f"got {asked[option]}; leave quantization_config out, or load the 16-bit model"
                )


def pack(base: nn.Module, config: NF4Config) -> list[str]:
    """Bring a model to NF4 in place; adapters on it stay. Returns what was done, in words: nothing where it was in NF4.

    At most one layer exists twice at any moment: each 16-bit weight is freed when it is packed, on the device it is on.

    Raises:
        ValueError: no layer to pack; NaN or Inf in a weight, found before the first is packed.
    """
    if any(bitsandbytes.is_linear4bit(module) for module in base.modules()):
        dequantised = bitsandbytes.adopt(base)
        adopted = sum(1 for _ in nf4_layers(base))
        return [f"{adopted} layers of bitsandbytes adopted without a copy"] + [
            f"{name}: {reason}" for name, reason in dequantised.items()
        ]
    if any(isinstance(module, NF4Linear) for module in base.modules()):
        return []
    blocksizes, skipped = _layers(base, config)
    dtypes = set()
    for name in blocksizes:
        weight: Any = base.get_submodule(name).weight
        if weight.dtype not in COMPUTE_DTYPES:
            raise ValueError(f"prepare: {name} must be float32, bfloat16 or float16, got {weight.dtype}")
        if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():  # one pass, no copy
            raise ValueError(f"prepare: {name} must be finite, got NaN or Inf in its weight")
        dtypes.add(str(weight.dtype).removeprefix("torch."))
    ids = {id(base.get_submodule(name)): blocksize for name, blocksize in blocksizes.items()}
    # A layer that stands in two places is packed once and stays one layer: hence ids, and every name of each.
    places = [name for name, module in base.named_modules(remove_duplicate=False) if id(module) in ids]
    packed: dict[int, NF4Linear] = {}
    for name in places:
        linear: Any = base.get_submodule(name)
        if id(linear) not in packed:
            layer = NF4Linear.from_linear(linear, ids[id(linear)], config.double_quant, config.compute_dtype)
            packed[id(linear)] = layer
        bitsandbytes.replace_layer(base, name, packed[id(linear)])
    if isinstance(base, PreTrainedModel):
        _hand_over(base, config, skipped)
    bits = report(base).bits_per_weight
    return [f"{len(packed)} layers from {' and '.join(sorted(dtypes))} to NF4 ({bits:.2f} bits per weight)"]


def _layers(base: nn.Module, config: NF4Config) -> tuple[dict[str, int], dict[str, str]]:
    """As `layers_to_pack`, for a model that may have PEFT's layers in it, or come from elsewhere than transformers."""
    if isinstance(base, PreTrainedModel):
        packed, skipped = layers_to_pack(base, config)
    else:
        linears = {name: module for name, module in base.named_modules() if type(module) is nn.Linear}
        sizes = {name: blocksize_for(linear.in_features, config.blocksize) for name, linear in linears.items()}
        packed, skipped = {name: size for name, size in sizes.items() if size}, {}
    of_adapters, excluded = adapter_names(base), config.modules_to_not_convert or []
    packed = {
        name: blocksize
        for name, blocksize in packed.items()
        if name not in of_adapters and should_convert_module(base_name(name), excluded)
    }
    if not packed:
        raise ValueError(
            f"prepare: model must have a torch.nn.Linear to pack whose width is a multiple of {BLOCKSIZES[0]}, "
            f"got {type(base).__name__} without one"
            + "".join(f"; {reason}" for reason in sorted(set(skipped.values()))[:3])
        )
    return packed, {base_name(name): reason for name, reason in skipped.items() if name not in of_adapters}


def _hand_over(base: Any, config: NF4Config, skipped: dict[str, str]) -> None:
    """Tell transformers that the model is packed: it saves, reloads, dequantises and trains as one loaded in NF4."""
    base.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    base.hf_quantizer.keep_names(base)
    base.config.quantization_config = config
    base.is_quantized, base.quantization_method, base.nf4lora_skipped = True, METHOD, skipped
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
