"""Checks of the arguments of `prepare`: the model, the LoraConfig and the NF4Config, each by itself."""

from __future__ import annotations

import copy
import difflib
import math
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BitsAndBytesConfig

from nf4lora.compat.torch import uncompiled
from nf4lora.preparation.targets import plain
from nf4lora.preparation.task import task_type
from nf4lora.quantization.config import NF4Config

if TYPE_CHECKING:
    from peft import LoraConfig

DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
# Names that users may write for an option: those of other tools, and options of NF4Config.
MEANT = {
    **{"rank": "r", "lora_r": "r", "lora_rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    **{"modules": "target_modules", "lora_target_modules": "target_modules", "lora_modules": "target_modules"},
    **{"dora": "use_dora", "rslora": "use_rslora", "config": "lora_config", "peft_config": "lora_config"},
    **{key: f"quantization_config=NF4Config({key}=...)" for key in ("blocksize", "double_quant", "compute_dtype")},
    "modules_to_not_convert": "quantization_config=NF4Config(modules_to_not_convert=...)",
}


def check_model(model: Any) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, nn.Module):
        hint = "; load it with AutoModelForCausalLM.from_pretrained first" if isinstance(model, str) else ""
        raise TypeError(f"prepare: model must be an nn.Module, got {type(model).__name__}{hint}")
    if uncompiled(model) is not model:
        raise ValueError("prepare: model must not be compiled yet, got a torch.compile wrapper; prepare, then compile")
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(module.merged for module in tuners):
        raise ValueError("prepare: adapters must not be merged, got a merged one; call model.unmerge_adapter() first")
    if not isinstance(model, PeftModel):
        if tuners:
            raise ValueError(
                f"prepare: a model with PEFT's layers must come as its PeftModel, got the {type(model).__name__} "
                f"inside; pass what prepare or get_peft_model returned, or call unload() on that first"
            )
        return
    kind = model.active_peft_config.peft_type
    if kind != "LORA":
        raise ValueError(f"prepare: the adapter must be LoRA, got {getattr(kind, 'value', kind)}")


def checked_lora_config(base: nn.Module, lora_config: LoraConfig | None, given: dict[str, Any]) -> LoraConfig:
    """A copy of the configuration, since PEFT writes into it; or a configuration made of single options."""
    from peft import LoraConfig

    from nf4lora.adapters.lora_layer import check_init, check_variant

    if lora_config is None:
        known = {field.name for field in fields(LoraConfig)}
        for name in given.keys() - known:
            meant = MEANT.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
            hint = f"did you mean {meant}?" if meant else "see peft.LoraConfig for all of them"
            raise TypeError(f"prepare: option {name!r} is unknown; {hint}")
        config = LoraConfig(**({"task_type": task_type(base)} | DEFAULTS | given))
    elif not isinstance(lora_config, LoraConfig):
        raise TypeError(
            f"prepare: lora_config must be a peft.LoraConfig, got {type(lora_config).__name__}; "
            f"single options go by name, as prepare(model, r=16)"
        )
    elif given:
        raise TypeError(
            f"prepare: options must be given in the LoraConfig or by name, not both, got a LoraConfig and "
            f"{', '.join(given)}"
        )
    else:
        config = copy.deepcopy(lora_config)
    if isinstance(config.r, bool) or not isinstance(config.r, int):
        raise TypeError(f"prepare: r must be an int, got {config.r!r}")
    if config.r < 1:
        raise ValueError(f"prepare: r must be at least 1, got {config.r}")
    for name in ("lora_alpha", "lora_dropout"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"prepare: {name} must be a number, got {value!r}")
    if not math.isfinite(config.lora_alpha) or config.lora_alpha <= 0:
        raise ValueError(f"prepare: lora_alpha must be positive, got {config.lora_alpha}")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"prepare: lora_dropout must be in [0, 1), got {config.lora_dropout}")
    _check_names(config)
    check_init("prepare", config)
    check_variant("prepare", config)
    return config


def _check_names(config: LoraConfig) -> None:
    """Refuse texts that PEFT would read letter by letter, and values for which its error would not name the option."""
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value, may_be_pattern = getattr(config, name, None), name != "modules_to_save"
        if value is None:
            continue
        if isinstance(value, str) and may_be_pattern:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(
                    f"prepare: {name} must be a regular expression if it is a text, got {value!r} ({error}); "
                    f"give plain names as a list"
                ) from error
        elif isinstance(value, str):
            raise TypeError(f"prepare: {name} must be a list of names, got {value!r}; write [{value!r}]")
        elif not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
            expected = "a regular expression or a list of names" if may_be_pattern else "a list of names"
            raise TypeError(f"prepare: {name} must be {expected}, got {plain(value)!r}")


def checked_nf4_config(config: Any) -> NF4Config | None:
    if config is None:
        return None
    if isinstance(config, (dict, BitsAndBytesConfig)):
        config = NF4Config.from_bnb(config)
    elif not isinstance(config, NF4Config):
        raise TypeError(
            f"prepare: quantization_config must be an NF4Config or a BitsAndBytesConfig, got {type(config).__name__}"
        )
    config = copy.deepcopy(config)
    config.layout = "native"  # other layouts are only read from files, never written
    return config
