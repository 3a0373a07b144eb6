"""prepare: any model in, a PeftModel whose layers run our kernels out."""

from __future__ import annotations

import copy
import difflib
import math
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BitsAndBytesConfig

from nf4lora import heap
from nf4lora.config import NF4Config
from nf4lora.loss import chunk_loss, has_chunked_loss
from nf4lora.model_tree import base_of, unchanged_on_failure
from nf4lora.pack import pack
from nf4lora.plan import Plan, plan_preparation
from nf4lora.report import Report, report
from nf4lora.task import task_type

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# What people write when they mean one of these: other tools' names, and options of NF4Config.
MEANT = {
    **{"rank": "r", "lora_r": "r", "lora_rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    **{"modules": "target_modules", "lora_target_modules": "target_modules", "lora_modules": "target_modules"},
    **{"dora": "use_dora", "rslora": "use_rslora", "config": "lora_config", "peft_config": "lora_config"},
    **{key: f"quantization_config=NF4Config({key}=...)" for key in ("blocksize", "double_quant", "compute_dtype")},
    "modules_to_not_convert": "quantization_config=NF4Config(modules_to_not_convert=...)",
}


class LeftOut:
    """Default of an option: its value where nobody gave one, and the sign that nobody did."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


DEFAULTS: dict[str, Any] = {
    **{"r": LeftOut(16), "lora_alpha": LeftOut(32), "lora_dropout": LeftOut(0.0)},
    "target_modules": LeftOut("all-linear"),
}


def prepare(
    model: nn.Module,
    lora_config: LoraConfig | None = None,
    *,
    r: int = DEFAULTS["r"],
    lora_alpha: float = DEFAULTS["lora_alpha"],
    lora_dropout: float = DEFAULTS["lora_dropout"],
    target_modules: str | list[str] | None = DEFAULTS["target_modules"],
    quantization_config: NF4Config | BitsAndBytesConfig | None = None,
    **lora_options: Any,
) -> PeftModel:
    """Freeze a model in NF4, put LoRA on it, and compute both in one op: returns a PeftModel for any trainer.

    The model may be one in 16 or 32 bits (its linear layers are quantised in place, one by one, on the device they are
    on), one loaded with `NF4Config`, one loaded by bitsandbytes (its bytes are adopted without a copy), or a PeftModel
    over any of these, which keeps its adapters. Embeddings, norms and the output head stay as they are; no dtype
    changes but those that the printed line names; adapters are float32. Whether gradient checkpointing is on is left
    to the trainer. A call with `labels` then computes its loss in chunks, where the model's head allows it
    (`nf4lora.loss.chunk_loss`), and its `logits` only when they are looked at.

    The head of a classifier, and whatever else was in no checkpoint, is trained in full and saved with the adapter. In
    a multimodal model the text part carries the adapters; the other parts are packed and frozen, unless target_modules
    names their layers. The printed line says so.

    Args:
        lora_config: a `peft.LoraConfig`, in place of single options
        r, lora_alpha, lora_dropout, target_modules, and every other option of `peft.LoraConfig` by its name, such as
            use_rslora, use_dora, modules_to_save, exclude_modules; task_type is that of the model's class
        quantization_config: how to pack a model that is still in 16 or 32 bits

    On a model that `prepare` returned, the same options return it as it is, and others are an error; on another
    PeftModel the options that were given are compared with its adapter. On a model of which an interrupted `prepare`
    has packed a part, it packs the rest.

    Raises:
        TypeError: an unknown option, or one of the wrong kind; model is no nn.Module.
        ValueError: no module matches target_modules, or the output head does; the model has no linear layer, is merged,
            carries an adapter with other options, or is quantised in another way; NaN in a weight; PEFT refuses. The
            model is then as it was.

    >>> model = prepare(model, r=16, lora_alpha=32)                         # doctest: +SKIP
    nf4lora: 210 layers from bfloat16 to NF4 (4.13 bits per weight); float32 adapters of rank 16 on 210 layers; ...
    """
    options = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": target_modules}
    given = {key: value for key, value in options.items() if not isinstance(value, LeftOut)} | lora_options
    defaults = {key: DEFAULTS[key].value for key in options.keys() - given.keys()}
    _check_model(model)
    asked = _lora_config(base_of(model), lora_config, given, defaults)
    packing = _nf4_config(quantization_config)
    plan = plan_preparation(model, asked, packing, set(given) if lora_config is None else None)
    for line in plan.warned:
        warnings.warn(f"prepare: {line}", stacklevel=2)
    return apply(plan, model)


def apply(plan: Plan, model: nn.Module) -> PeftModel:
    """Carry out a plan that was just made for this model; it prints one line.

    Whatever stops it (out of memory, Ctrl-C) leaves a model without half an adapter, of which some layers may be packed
    already: `prepare` then takes up the rest.
    """
    from peft import PeftModel, get_peft_model

    from nf4lora import adapter

    base: Any = plan.base
    done = pack(base, plan.packing)
    adapter.install()
    prepared: Any = model
    with unchanged_on_failure(base):
        if plan.lora is not None:
            prepared = get_peft_model(base, copy.deepcopy(plan.lora))
            prepared.nf4lora_asked = plan.asked
        fused = adapter.fuse(model) if isinstance(model, PeftModel) else 0
        chunked = (chunk_loss(base) or plan.lora is not None) and has_chunked_loss(base)
        heap.keep_small(base)
        if _recomputes(base):
            base.enable_input_require_grads()  # reentrant checkpointing needs it; PEFT leaves it out when quantised
        if done or plan.lora or fused or chunked:
            _say(plan, done, fused, chunked, report(prepared))
    return prepared


def _recomputes(base: Any) -> bool:
    """Whether it recomputes activations. transformers has the first name from 5.23 on, and then warns of the second."""
    if hasattr(base, "is_activation_checkpointing"):
        return base.is_activation_checkpointing
    return getattr(base, "is_gradient_checkpointing", False)


def _say(plan: Plan, done: list[str], fused: int, chunked: bool, about: Report) -> None:
    if plan.packing.blocksizes and about.bits_per_weight:
        done[0] += f" ({about.bits_per_weight:.2f} bits per weight)"
    if plan.lora is not None:
        done += [f"float32 adapters of rank {plan.asked.r} on {about.adapted_layers} layers", *plan.said]
    done += [f"the fused op under the adapters of {fused} layers"] if fused else []
    done += ["a loss that never holds all logits"] if chunked else []
    share = about.trainable / max(about.parameters, 1)
    if line := about.mostly_unpacked():
        warnings.warn(f"prepare: {line}", stacklevel=4)
    print(f"nf4lora: {'; '.join(done)}; {share:.2%} of {about.parameters / 1e6:.1f} M parameters train")


def _check_model(model: Any) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, nn.Module):
        hint = "; load it with AutoModelForCausalLM.from_pretrained first" if isinstance(model, str) else ""
        raise TypeError(f"prepare: model must be an nn.Module, got {type(model).__name__}{hint}")
    if hasattr(model, "_orig_mod"):
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


def _lora_config(
    base: nn.Module, lora_config: LoraConfig | None, given: dict[str, Any], defaults: dict[str, Any]
) -> LoraConfig:
    """The checked configuration; a copy, since PEFT writes into what it is given."""
    from peft import LoraConfig

    from nf4lora.adapter import check_init

    if lora_config is None:
        known = {field.name for field in fields(LoraConfig)}
        for name in given.keys() - known:
            meant = MEANT.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
            hint = f"did you mean {meant}?" if meant else "see peft.LoraConfig for all of them"
            raise TypeError(f"prepare: option {name!r} is unknown; {hint}")
        config = LoraConfig(**({"task_type": task_type(base)} | defaults | given))
    elif not isinstance(lora_config, LoraConfig):
        raise TypeError(
            f"prepare: lora_config must be a peft.LoraConfig, got {type(lora_config).__name__}; "
            f"single options go by name, as prepare(model, r=16)"
        )
    elif given:
        raise TypeError(
            f"prepare: options must stand in the LoraConfig where there is one, got {', '.join(given)} beside"
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
    check_init("prepare", config)
    return config


def _nf4_config(config: Any) -> NF4Config | None:
    if config is None:
        return None
    if isinstance(config, (dict, BitsAndBytesConfig)):
        config = NF4Config.from_bnb(config)
    elif not isinstance(config, NF4Config):
        raise TypeError(
            f"prepare: quantization_config must be an NF4Config or a BitsAndBytesConfig, got {type(config).__name__}"
        )
    config = copy.deepcopy(config)
    config.layout = "native"  # a foreign layout is read from a file, never made
    return config
