"""prepare: any model in, a PeftModel whose layers run our kernels out."""

from __future__ import annotations

import copy
import difflib
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nf4lora import bitsandbytes, quantizer
from nf4lora.adapter_files import base_name, base_of, nf4_layers
from nf4lora.linear import COMPUTE_DTYPES, NF4Linear, blocksize_for
from nf4lora.quantizer import NF4Config
from nf4lora.report import report

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# What people write when they mean one of ours: other tools' names, and quantisation options given to prepare.
MEANT = {
    **{"rank": "r", "lora_r": "r", "lora_rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    **{"modules": "target_modules", "lora_target_modules": "target_modules", "lora_modules": "target_modules"},
    **{"dora": "use_dora", "rslora": "use_rslora", "config": "lora_config", "peft_config": "lora_config"},
    **{key: f"quantization_config=NF4Config({key}=...)" for key in ("blocksize", "double_quant", "compute_dtype")},
    "modules_to_not_convert": "quantization_config=NF4Config(modules_to_not_convert=...)",
}
# PEFT writes these into a configuration by itself.
NOT_ASKED = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "runtime_config")


class LeftOut:
    """Default of an option: what it is where nobody gave it. Unlike a bare default, it shows that nobody did."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def prepare(
    model: nn.Module,
    lora_config: LoraConfig | None = None,
    *,
    r: int = LeftOut(16),  # type: ignore[assignment]
    lora_alpha: float = LeftOut(32),  # type: ignore[assignment]
    lora_dropout: float = LeftOut(0.0),  # type: ignore[assignment]
    target_modules: str | list[str] | None = LeftOut("all-linear"),  # type: ignore[assignment]
    quantization_config: Any = None,
    **lora_options: Any,
) -> PeftModel:
    """Freeze a model in NF4, put LoRA on it, and run both as one op: returns a PeftModel, ready for any trainer.

    The model may be one in 16 or 32 bits (its linear layers are quantised in place, one by one, on the device they are
    on), one loaded with `NF4Config`, one loaded by bitsandbytes (its bytes are adopted without a copy), or a PeftModel
    over any of these, which keeps its adapters. Embeddings, norms and the output head stay as they are; no dtype changes
    but those that the printed line names; adapters are float32. Gradient checkpointing is left to the trainer.

    Args:
        lora_config: a `peft.LoraConfig` instead of single options
        r, lora_alpha, lora_dropout, target_modules, and any other option of `peft.LoraConfig` by its name, such as
            use_rslora, use_dora, modules_to_save; task_type is CAUSAL_LM where the model generates
        quantization_config: `NF4Config` or `BitsAndBytesConfig`, for a model that is still in 16 or 32 bits

    Raises:
        TypeError: an unknown option, or one of the wrong kind; model is no nn.Module.
        ValueError: no module matches target_modules, or lora_head is among them; the model has no linear layer, is
            merged, was prepared with other options, or is quantised in a way that cannot be adopted; NaN in a weight.

    On a model that carries adapters already, every option given is compared with what is there.

    >>> model = prepare(model, r=16, lora_alpha=32)                         # doctest: +SKIP
    """
    from peft import PeftModel, get_peft_model

    options = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": target_modules}
    given = {key: value for key, value in options.items() if not isinstance(value, LeftOut)} | lora_options
    defaults = {key: value.value for key, value in options.items() if isinstance(value, LeftOut)}
    _check_kind(model)
    asked = _lora_config(model, lora_config, given, defaults)
    quantization_config = _nf4_config(quantization_config)
    base = base_of(model)
    _check_model(model, base)
    _check_targets(base, asked)
    if isinstance(model, PeftModel):
        _check_same_options(model, asked, given if lora_config is None else None)
    if any(isinstance(module, NF4Linear) for module in base.modules()):
        _check_same_quantization(base, quantization_config)

    done = _pack(base, quantization_config)
    from nf4lora import adapter

    adapter.install()
    if isinstance(model, PeftModel):
        if fused := adapter.fuse(model):
            done.append(f"gave {fused} layers with adapters the fused op")
        prepared = model
    else:
        prepared = get_peft_model(base, copy.deepcopy(asked))
        prepared.nf4lora_asked = asked
        done.append(f"put adapters of rank {asked.r} in float32 on {report(prepared).adapted_layers} layers")
    if getattr(base, "is_activation_checkpointing", False) and hasattr(base, "enable_input_require_grads"):
        base.enable_input_require_grads()  # reentrant checkpointing needs it; PEFT leaves it out for quantised models
    if done:
        about = report(prepared)
        print(f"nf4lora: {', '.join(done)}; {about.trainable / max(about.parameters, 1):.2%} of the model is trainable")
    return prepared
