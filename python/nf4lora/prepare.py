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
from transformers.pytorch_utils import Conv1D

from nf4lora.adapter_files import adapter_names, base_name, base_of
from nf4lora.config import NF4Config
from nf4lora.loss import chunk_loss, has_chunked_loss
from nf4lora.pack import check_packable, check_same_packing, pack
from nf4lora.report import report

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
# What PEFT writes into a configuration by itself.
NOT_ASKED = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "runtime_config"}


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

    Args:
        lora_config: a `peft.LoraConfig`, in place of single options
        r, lora_alpha, lora_dropout, target_modules, and every other option of `peft.LoraConfig` by its name, such as
            use_rslora, use_dora, modules_to_save; task_type is CAUSAL_LM where the model generates text
        quantization_config: how to pack a model that is still in 16 or 32 bits

    On a model that `prepare` returned, the same options return it as it is, and others are an error; on another
    PeftModel the options that were given are compared with its adapter.

    Raises:
        TypeError: an unknown option, or one of the wrong kind; model is no nn.Module.
        ValueError: no module matches target_modules, or the output head does; the model has no linear layer, is merged,
            carries an adapter with other options, or is quantised in another way; NaN in a weight. The model is then
            as it was.

    >>> model = prepare(model, r=16, lora_alpha=32)                         # doctest: +SKIP
    nf4lora: 210 layers from bfloat16 to NF4 (4.13 bits per weight); float32 adapters of rank 16 on 210 layers; ...
    """
    from peft import PeftModel, get_peft_model

    options = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": target_modules}
    given = {key: value for key, value in options.items() if not isinstance(value, LeftOut)} | lora_options
    defaults = {key: DEFAULTS[key].value for key in options.keys() - given.keys()}
    _check_model(model)
    base: Any = base_of(model)
    check_packable(base)
    asked = _lora_config(base, lora_config, given, defaults)
    packing = _nf4_config(quantization_config)
    if packing is not None:
        check_same_packing(base, packing)
    _check_targets(base, asked)
    if isinstance(model, PeftModel):
        _check_same_adapter(model, base, asked, set(given) if lora_config is None else None)

    done = pack(base, packing or NF4Config())
    from nf4lora import adapter

    adapter.install()
    prepared: Any = model if isinstance(model, PeftModel) else get_peft_model(base, copy.deepcopy(asked))
    if prepared is not model:
        prepared.nf4lora_asked = asked
        done.append(f"float32 adapters of rank {asked.r} on {report(prepared).adapted_layers} layers")
    elif fused := adapter.fuse(model):
        done.append(f"the fused op under the adapters of {fused} layers")
    if (chunk_loss(base) or prepared is not model) and has_chunked_loss(base):
        done.append("a loss that never holds all logits")
    if getattr(base, "is_activation_checkpointing", False):
        base.enable_input_require_grads()  # reentrant checkpointing needs it; PEFT leaves it out for quantised models
    if done:
        about = report(prepared)
        share = about.trainable / max(about.parameters, 1)
        print(f"nf4lora: {'; '.join(done)}; {share:.2%} of {about.parameters / 1e6:.1f} M parameters train")
    return prepared


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
        if hasattr(base, "prepare_inputs_for_generation"):
            defaults = defaults | {"task_type": "CAUSAL_LM"}
        config = LoraConfig(**(defaults | given))
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


def _check_targets(base: nn.Module, config: LoraConfig) -> None:
    names, head = _targets(base, config), _head_name(base)
    linear = sorted({name.rpartition(".")[2] for name in _linear_names(base)} - {head})
    if head in names:
        raise ValueError(
            f"prepare: target_modules must not name the output head, got {head!r}; trainers multiply by its weight "
            f"directly and would never use the adapter. To train it in full: modules_to_save=[{head!r}]"
        )
    if not names and not config.target_parameters:
        raise ValueError(
            f"prepare: target_modules must match a module, got {_plain(config.target_modules)!r}, which matches none; "
            f"the linear layers are called {', '.join(linear)}"
        )
    if not isinstance(config.target_modules, str):
        idle = [
            target
            for target in sorted(config.target_modules or ())
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
        if idle:
            warnings.warn(
                f"prepare: nothing is called {', '.join(idle)}, which target_modules names; the linear layers are "
                f"called {', '.join(linear)}",
                stacklevel=3,
            )


def _targets(base: nn.Module, lora_config: LoraConfig) -> set[str]:
    """Names of the modules that PEFT would put an adapter on."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CUSTOMARY

    config: Any = copy.copy(lora_config)
    if config.target_modules is None and not config.target_parameters:
        family = getattr(getattr(base, "config", None), "model_type", None)
        if family not in CUSTOMARY:
            raise ValueError(
                f"prepare: target_modules must be given for {type(base).__name__}, got None; try 'all-linear'"
            )
        config.target_modules = set(CUSTOMARY[family])
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = _linear_names(base) - {_head_name(base)}
    of_adapters = adapter_names(base)
    names = {base_name(name) for name, _ in base.named_modules() if name and name not in of_adapters}
    return {name for name in names if check_target_module_exists(config, name)}


def _linear_names(base: nn.Module) -> set[str]:
    of_adapters = adapter_names(base)
    return {
        base_name(name)
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name not in of_adapters
    }


def _head_name(base: nn.Module) -> str | None:
    find: Any = getattr(base, "get_output_embeddings", None)
    head = None if find is None else find()
    return next((base_name(name) for name, module in base.named_modules() if head is not None and module is head), None)


def _check_same_adapter(model: PeftModel, base: nn.Module, asked: LoraConfig, given: set[str] | None) -> None:
    """Compare with what the model was prepared with; on a foreign adapter, only what was given (None: everything)."""
    before = getattr(model, "nf4lora_asked", None)
    ours = before is not None
    before = before or model.active_peft_config
    for option in [field.name for field in fields(asked) if field.name not in NOT_ASKED]:
        if not ours and given is not None and option not in given:
            continue
        old, new = _plain(getattr(before, option)), _plain(getattr(asked, option))
        if option == "target_modules" and not ours:
            # PEFT has replaced "all-linear" by names, and long lists by shorter ones: compare what they match.
            old, new = (sorted(_targets(base, config)) for config in (before, asked))
        if old != new:
            old, new = (_plain(getattr(config, option)) for config in (before, asked))
            raise ValueError(
                f"prepare: {option} must be that of the adapter which the model carries, {old!r}, got {new!r}; give "
                f"the same options again, or call model.unload() first to start anew"
            )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) and all(isinstance(v, str) for v in value) else value
