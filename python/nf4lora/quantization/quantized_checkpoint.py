"""Handles `from_pretrained(..., quantization_config=NF4Config(...))` for a checkpoint that is quantised already.

transformers uses the configuration of the checkpoint and ignores the given one with a warning. If the two have
different classes, it raises an error that does not say what to do. So this file replaces the function of transformers
that decides on this.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

from nf4lora.quantization.config import METHOD, NF4Config


def way_to_16_bits(method: str) -> str:
    """Advice for an error text: how to get a checkpoint with another quantisation into NF4."""
    config = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    for option, value in (("dequantize", True), ("run_compressed", False)):
        if config is not None and option in inspect.signature(config).parameters:
            return (
                f"load it in 16 bits with quantization_config=transformers.{config.__name__}({option}={value}), "
                f"then call nf4lora.prepare(model)"
            )
    return "load the 16-bit checkpoint that it was made from"


def merged(of_checkpoint: Any, asked: NF4Config) -> NF4Config:
    """The checkpoint's configuration, with the options of the user's that can still be chosen.

    Raises:
        ValueError: the checkpoint is quantised in another way, or packed with other options than the given ones.
    """
    values = of_checkpoint if isinstance(of_checkpoint, dict) else of_checkpoint.to_dict()
    method = values.get("quant_method")
    method = str(getattr(method, "value", method))
    if method == METHOD:
        config = NF4Config.from_dict(values)
    elif method == "bitsandbytes" or values.get("load_in_4bit") or values.get("load_in_8bit"):
        config = NF4Config.from_bnb(values, asked.blocksize if "blocksize" in asked.given else 64)
    else:
        raise ValueError(
            f"NF4Config: the checkpoint must be in 16 or 32 bits, in NF4 or in bitsandbytes' nf4, got one quantised "
            f"with {method}; {way_to_16_bits(method)}"
        )
    for option in ("blocksize", "double_quant"):
        packed, wanted = getattr(config, option), getattr(asked, option)
        if option in asked.given and packed != wanted:
            raise ValueError(
                f"NF4Config: {option} must be what the checkpoint is packed with, {packed}, got {wanted}; leave it "
                f"out, or quantise the 16-bit model"
            )
    not_packed = set(config.modules_to_not_convert or [])
    if new := [name for name in asked.modules_to_not_convert or [] if name not in not_packed]:
        raise ValueError(
            f"NF4Config: modules_to_not_convert must name what the checkpoint left in 16 bits, {sorted(not_packed)}, "
            f"got {new}; leave it out, or quantise the 16-bit model"
        )
    if "compute_dtype" in asked.given:
        config.compute_dtype = asked.compute_dtype
    return config


def install() -> None:
    """Make transformers call `merged` where an NF4Config is given. A second call does nothing."""
    original: Any = AutoHfQuantizer.merge_quantization_configs
    if getattr(original, "installed_by_nf4lora", False):
        return

    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        asked = quantization_config_from_args
        if isinstance(asked, dict) and asked.get("quant_method") == METHOD:
            asked = NF4Config.from_dict(asked)
        if isinstance(asked, NF4Config):
            return merged(quantization_config, copy.deepcopy(asked))
        return original(quantization_config, asked)

    merge_quantization_configs.installed_by_nf4lora = True  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)  # type: ignore[method-assign,assignment]
