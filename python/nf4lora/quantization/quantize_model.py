"""Packs a loaded model in NF4 in place, layer by layer, from 16 or 32 bits or from bitsandbytes' layers.

First `plan_packing` checks everything and raises errors, then `pack` changes the model. If `pack` is interrupted (out
of memory, Ctrl-C), some layers of the model are packed; the same two calls then pack the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from nf4lora.adapters.new_weights import marked_as
from nf4lora.nn.linear import BLOCKSIZES, COMPUTE_DTYPES, NF4Linear, blocksize_for
from nf4lora.nn.model_tree import adapter_names, base_name, nf4_layers, replace_layers
from nf4lora.quantization import bitsandbytes_format
from nf4lora.quantization.config import METHOD, NF4Config, mark_as_packed
from nf4lora.quantization.quantized_checkpoint import way_to_16_bits
from nf4lora.quantization.quantizer import keep_in_16_bits, layers_to_pack
from nf4lora.quantization.weight_readers import read_weights
from nf4lora.words import dtype_name, listed


@dataclass(frozen=True)
class Packing:
    """What `pack` will do to a model."""

    config: NF4Config
    blocksizes: dict[str, int]  # by name of each layer to pack
    skipped: dict[str, str]  # reason by name of each layer that stays in 16 bits
    adopt: bool = False  # whether the layers come from bitsandbytes
    keep: dict[str, str] = field(default_factory=dict)  # reason by name of the layers that are trained in full


def plan_packing(base: nn.Module, config: NF4Config | None, trained: Mapping[str, str]) -> Packing:
    """Decide which layers become NF4; changes nothing.

    Args:
        config: how to pack; None: as the model is packed already, or else the defaults
        trained: reason by name of the modules that are trained in full; a packed layer cannot be

    Raises:
        ValueError: there is no layer to pack; the model is packed with other options; a layer in `trained` is packed;
            NaN or Inf in a weight.
    """
    if config is not None:
        _check_same_packing(base, config)
    own_config = _own_config(base)
    also = (config.modules_to_not_convert or []) if config is not None else []
    config = copy.deepcopy(own_config or config or NF4Config())
    config.layout = "native"  # other layouts are only read from files, never written
    keep_in_16_bits(config, also)
    if any(bitsandbytes_format.is_linear4bit(module) for module in base.modules()):
        bitsandbytes_format.packed_weights(base)
        keep = {base_name(name): reason for name, reason in _below(base, trained).items()}
        return Packing(config, {}, {}, adopt=True, keep=keep)
    in_nf4 = {name for name, module in base.named_modules() if isinstance(module, NF4Linear)}
    if packed := sorted(map(base_name, in_nf4 & _below(base, trained).keys())):
        raise ValueError(
            f"prepare: modules_to_save must name layers in 16 or 32 bits, got {listed(packed)}, packed in NF4; "
            f"load the model with NF4Config(modules_to_not_convert={packed[:3]}), or leave modules_to_save out"
        )
    blocksizes, skipped, keep = _layers(base, config, trained)
    if not blocksizes and not in_nf4:
        raise ValueError(
            f"prepare: model must have a torch.nn.Linear to pack whose width is a multiple of {BLOCKSIZES[0]}, "
            f"got {type(base).__name__} without one"
            + "".join(f"; {reason}" for reason in sorted(set(skipped.values()))[:3])
        )
    for name in blocksizes:
        weight: Any = base.get_submodule(name).weight
        if weight.dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"prepare: {base_name(name)} must be float32, bfloat16 or float16, got {weight.dtype}; "
                f"{way_to_16_bits('fp8') if 'float8' in str(weight.dtype) else 'cast the model first'}"
            )
        if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():  # one pass, no copy
            raise ValueError(f"prepare: {base_name(name)} must be finite, got NaN or Inf in its weight")
    return Packing(config, blocksizes, skipped, keep=keep)


def pack(base: nn.Module, plan: Packing) -> list[str]:
    """Pack a model in NF4 in place; its adapters stay. Returns texts about the changes, none if it was packed before.

    Each weight is packed on its own device and its 16-bit version is freed at once: at most one layer exists twice.
    """
    if plan.adopt:
        dequantised = bitsandbytes_format.adopt(base, plan.keep)
        adopted = sum(1 for _ in nf4_layers(base))
        return [f"{adopted} layers of bitsandbytes adopted without a copy"] + [
            f"{name}: {reason}" for name, reason in dequantised.items()
        ]
    if not plan.blocksizes:
        return []
    base.nf4lora_packing = plan.config  # type: ignore[assignment]  # for a later call, if this one is interrupted
    again = any(isinstance(module, NF4Linear) for module in base.modules())
    dtypes = set()

    def packed(name: str, linear: Any) -> NF4Linear:
        dtypes.add(dtype_name(linear.weight.dtype))
        config = plan.config
        layer = NF4Linear.from_linear(linear, plan.blocksizes[name], config.double_quant, config.compute_dtype)
        for tensor in layer.parameters():
            marked_as(tensor, linear.weight)
        return layer

    replace_layers(base, plan.blocksizes, packed)
    if isinstance(base, PreTrainedModel):
        keep_in_16_bits(plan.config, list(plan.keep))
        mark_as_packed(base, plan.config, plan.skipped)
        del base.nf4lora_packing
    from_dtypes = " and ".join(sorted(dtypes))
    return [f"{len(plan.blocksizes)} {'more ' if again else ''}layers from {from_dtypes} to NF4"]


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_packable(base: nn.Module) -> None:
    """Refuse a model that cannot be packed, whatever the options.

    Raises:
        ValueError: it has no torch.nn.Linear, its weights are not in memory, or it is quantised in another way.
    """
    if not any(isinstance(module, nn.Linear) for module in base.modules()):
        raise ValueError(
            f"prepare: model must have torch.nn.Linear layers to pack, got {type(base).__name__} with none"
        )
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(
            "prepare: the weights must be in memory, got meta tensors; load the model without disk offload"
        )
    if any(bitsandbytes_format.is_linear4bit(module) for module in base.modules()):
        return
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", METHOD)
    method = str(getattr(method, "value", method))
    if method != METHOD:
        raise ValueError(
            f"prepare: model must be in 16 or 32 bits, in NF4 or in bitsandbytes' nf4, got one quantised with "
            f"{method}; {way_to_16_bits(method)}"
        )


def _check_same_packing(base: nn.Module, config: NF4Config) -> None:
    """Refuse options that differ from those with which the model is packed already, if it is."""
    for name, module in base.named_modules():
        if isinstance(module, NF4Linear):
            present: dict[str, Any] = {"blocksize": module.blocksize, "double_quant": module.double_quant}
            present["compute_dtype"] = module.compute_dtype
        elif bitsandbytes_format.is_linear4bit(module):
            state: Any = module.weight.quant_state
            present = {"blocksize": state.blocksize, "double_quant": state.nested}
        else:
            continue
        blocksize = blocksize_for(module.in_features, config.blocksize)  # type: ignore[arg-type]
        asked: dict[str, Any] = {"blocksize": blocksize, "double_quant": config.double_quant}
        asked |= {"compute_dtype": config.compute_dtype} if config.compute_dtype is not None else {}
        for option in asked.keys() & present.keys():
            if asked[option] != present[option]:
                raise ValueError(
                    f"prepare: {option} must be what the model is packed with, {present[option]} in {base_name(name)}, "
                    f"got {asked[option]}; leave quantization_config out, or load the 16-bit model"
                )


# ---- details ---------------------------------------------------------------------------------------------------------


def _own_config(base: nn.Module) -> NF4Config | None:
    """The config with which the model was packed, by loading it or by `pack`, which may have been interrupted."""
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    config = config if isinstance(config, NF4Config) else getattr(base, "nf4lora_packing", None)
    return config if isinstance(config, NF4Config) else None


def _below(base: nn.Module, trained: Mapping[str, str]) -> dict[str, str]:
    """The linear layers inside the given modules: reason by full name, with PEFT's wrappers in it."""
    reasons = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            plain = base_name(name)
            above = next((above for above in trained if plain == above or plain.startswith(f"{above}.")), None)
            if above is not None:
                reasons[name] = trained[above]
    return reasons


def _layers(
    base: nn.Module, config: NF4Config, trained: Mapping[str, str]
) -> tuple[dict[str, int], dict[str, str], dict[str, str]]:
    """As `layers_to_pack`, but also for a model with PEFT's layers in it, or one that is not from transformers.

    The third result is the reason by name of the layers that are not packed because they are trained in full.
    """
    if isinstance(base, PreTrainedModel):
        packed, skipped = layers_to_pack(base, config)
    else:
        packed, skipped, readers = {}, {}, read_weights(base)
        for name, module in base.named_modules():
            if type(module) is not nn.Linear:
                continue
            if reader := readers.get(id(module)):
                skipped[name] = f"{reader} directly"
            elif blocksize := blocksize_for(module.in_features, config.blocksize):
                packed[name] = blocksize
    of_adapters, excluded, full = adapter_names(base), config.modules_to_not_convert or [], _below(base, trained)
    packed = {
        name: blocksize
        for name, blocksize in packed.items()
        if name not in of_adapters and should_convert_module(base_name(name), excluded)
    }
    keep = {name: full[name] for name in packed.keys() & full.keys()}
    skipped |= keep
    return (
        {name: blocksize for name, blocksize in packed.items() if name not in keep},
        {base_name(name): reason for name, reason in skipped.items() if name not in of_adapters},
        {base_name(name): reason for name, reason in keep.items()},
    )
