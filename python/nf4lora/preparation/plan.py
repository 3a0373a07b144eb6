"""What `prepare` will do to a model. All decisions and checks are made first, so that an error leaves it unchanged."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nf4lora.adapters.new_weights import grown_vocabulary, modules_of, new_parameters, task_heads
from nf4lora.nn.model_tree import adapter_names, base_name, base_of, token_layers
from nf4lora.preparation.options import check_model, checked_lora_config, checked_nf4_config
from nf4lora.preparation.rehearsal import rehearse
from nf4lora.preparation.targets import Targets, find_targets, matched, plain
from nf4lora.quantization.config import NF4Config
from nf4lora.quantization.quantize_model import Packing, check_packable, plan_packing
from nf4lora.words import dtype_name, listed

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

# Fields of a configuration that PEFT sets itself.
NOT_ASKED = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "runtime_config"}
# The reasons why a module is trained in full.
HEAD = "head of the model's task"
NEW = "in no checkpoint"
ASKED = "named in modules_to_save"


@dataclass(frozen=True)
class Plan:
    """The result of `plan_preparation`, which `prepare.apply` carries out."""

    base: nn.Module
    packing: Packing
    asked: LoraConfig  # as the user wrote it; a second call is compared with this
    lora: LoraConfig | None  # what PEFT gets; None where the model has its adapter already
    said: tuple[str, ...]  # parts of the logged line, about the adapters
    warned: tuple[str, ...]  # texts of warnings


def plan_preparation(
    model: nn.Module,
    lora_config: LoraConfig | None = None,
    given: Mapping[str, Any] | None = None,
    quantization_config: NF4Config | BitsAndBytesConfig | None = None,
) -> Plan:
    """Decide which layers are packed, which carry adapters and which are trained in full; changes nothing.

    Args:
        model: a model, or a PeftModel, whose adapter is then kept
        lora_config: the configuration of the adapter
        given: options by name, in place of lora_config; only these are compared with an adapter that is there already
        quantization_config: how to pack a model in 16 or 32 bits

    Raises:
        TypeError: an option of the wrong kind.
        ValueError: the model or an option is not allowed, or they do not fit together; errors of PEFT are included.
    """
    from peft import PeftModel

    from nf4lora.adapters import lora_layer

    check_model(model)
    base = base_of(model)
    asked = checked_lora_config(base, lora_config, dict(given or {}))
    packing = checked_nf4_config(quantization_config)
    check_packable(base)
    if isinstance(model, PeftModel):
        _check_same_adapter(model, base, asked, None if lora_config is not None else set(given or ()))
        config = model.active_peft_config
        lora_layer.check_variant("prepare", config)
        trained = _named_modules(base, _full_names(config), ASKED)
        targets = find_targets(base, asked)
        drawn = {base_name(name) for name in new_parameters(base) - adapter_names(base)}
        frozen = {
            name
            for name in map(base_name, _new_modules(base, asked))
            if name not in trained and any(key.startswith(f"{name}.") for key in drawn)
        }
        return Plan(
            base=base,
            packing=plan_packing(base, packing, trained),
            asked=asked,
            lora=None,
            said=(),
            warned=_warnings(base, config, targets, sorted(frozen)),
        )
    lora = copy.deepcopy(asked)
    new = _new_modules(base, asked)
    given_in_full = tuple(asked.modules_to_save or ())
    lora.modules_to_save = [*given_in_full, *(name for name in new if not name.endswith(given_in_full))] or None
    targets = find_targets(base, lora)
    lora.target_modules, lora.exclude_modules = targets.target_modules, targets.exclude_modules
    trained = new | _named_modules(base, _full_names(lora), ASKED)
    packed = plan_packing(base, packing, trained)
    lora_layer.install()
    rehearse(base, packed.blocksizes, packed.config.double_quant, lora)
    return Plan(
        base=base,
        packing=packed,
        asked=asked,
        lora=lora,
        said=(*_said(targets), *_trained(new), *_untied(base, lora)),
        warned=_warnings(base, lora, targets, []),
    )


# ---- modules that are trained in full --------------------------------------------------------------------------------


def _new_modules(base: nn.Module, asked: LoraConfig) -> dict[str, str]:
    """The modules that must be trained with the adapter, because they start at random: reason by name.

    An embedding with more rows than the checkpoint's is not included: whether to train all of it for a few new rows is
    the user's decision, about which `_warnings` informs.
    """
    modules, _ = modules_of(base, new_parameters(base) - adapter_names(base))
    if asked.trainable_token_indices is not None or grown_vocabulary(base) is not None:
        tokens = {name for name, module in base.named_modules() if module in token_layers(base)}
        modules = [name for name in modules if name not in tokens]
    return dict.fromkeys(task_heads(base), HEAD) | {
        name: NEW
        for name in modules
        if not any(name == head or name.startswith(f"{head}.") for head in task_heads(base))
    }


def _full_names(config: Any) -> list[str]:
    """Names of the modules that PEFT trains in full: those given, and those that it adds for the task."""
    by_task = {
        "SEQ_CLS": ["classifier", "score"],
        "TOKEN_CLS": ["classifier", "score"],
        "QUESTION_ANS": ["qa_outputs"],
    }
    return [
        *(config.modules_to_save or []),
        *by_task.get(str(getattr(config.task_type, "value", config.task_type)), []),
    ]


def _named_modules(base: nn.Module, endings: list[str], reason: str) -> dict[str, str]:
    """The modules that PEFT finds by these endings of their names."""
    names = {base_name(name) for name, _ in base.named_modules(remove_duplicate=False) if name}
    return {name: reason for name in sorted(names) if name.endswith(tuple(endings))}


# ---- texts for the user ----------------------------------------------------------------------------------------------


def _said(targets: Targets) -> list[str]:
    lines = []
    if targets.text_part is not None:
        lines.append(
            f"adapters on {targets.text_part} alone, which works on text; the other parts stay frozen unless "
            f"target_modules names their layers"
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in targets.left_out.items():
        reasons.setdefault(reason, []).append(name.rpartition(".")[2])
    lines += [
        f"no adapter on {len(names)} layers called {', '.join(sorted(set(names)))} ({reason})"
        for reason, names in reasons.items()
    ]
    return lines


def _trained(new: dict[str, str]) -> list[str]:
    return [
        f"{', '.join(name for name, why in new.items() if why == reason)} trained in full and saved ({reason})"
        for reason in (HEAD, NEW)
        if reason in new.values()
    ]


def _untied(base: nn.Module, config: LoraConfig) -> list[str]:
    """What happens to a head and an embedding that share their weight, if only one of them is trained in full."""
    layers = token_layers(base)
    if len(layers) < 2 or getattr(layers[0], "weight", None) is not getattr(layers[1], "weight", layers):
        return []
    names = [next(base_name(name) for name, module in base.named_modules() if module is layer) for layer in layers]
    full = [name for name in names if any(name.endswith(ending) for ending in config.modules_to_save or [])]
    if not full:
        return []
    if getattr(config, "ensure_weight_tying", False):
        return [f"{' and '.join(names)} trained as one weight"]
    other = next((name for name in names if name not in full), None)
    if other is None:
        return [
            f"{' and '.join(names)}, which shared one weight, are trained apart (ensure_weight_tying=True keeps one)"
        ]
    return [
        f"{full[0]} no longer shares its weight with {other}, which stays frozen (ensure_weight_tying=True trains both "
        f"as one)"
    ]


def _warnings(base: nn.Module, config: LoraConfig, targets: Targets, frozen: list[str]) -> tuple[str, ...]:
    lines = []
    if targets.idle:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in targets.names}))
        lines.append(f"nothing is called {', '.join(targets.idle)}, which target_modules names; adapters go on {names}")
    everything = {base_name(name) for name, _ in base.named_modules(remove_duplicate=False)}
    if missing := [n for n in config.modules_to_save or [] if not any(name.endswith(n) for name in everything)]:
        lines.append(
            f"nothing is called {', '.join(missing)}, which modules_to_save names; it is neither trained nor saved"
        )
    if frozen:
        lines.append(
            f"{', '.join(frozen)} must be trained with the adapter, but stays frozen, since the adapter that the model "
            f"carries leaves it out; put adapters on with prepare, or name it in modules_to_save"
        )
    if alone := modules_of(base, new_parameters(base) - adapter_names(base))[1]:
        lines.append(
            f"{listed([base_name(name) for name in alone])} was in no checkpoint and is in no layer that could be "
            f"trained in full: it stays as transformers has initialised it, and save_adapter saves it with the adapter"
        )
    rows = grown_vocabulary(base)
    if rows is not None and config.trainable_token_indices is None:
        embedding: Any = next(iter(token_layers(base)), None)
        name = next((base_name(n) for n, module in base.named_modules() if module is embedding), "")
        if embedding is not None and not any(name.endswith(ending) for ending in config.modules_to_save or []):
            now = embedding.weight.shape[0]
            lines.append(
                f"the vocabulary has {now} tokens, {rows} of them in the checkpoint; the new rows of {name} stay as "
                f"they are. To train them alone: trainable_token_indices=list(range({rows}, {now}))"
            )
    if (wide := upcast(base)) is not None:
        lines.append(
            f"the model was loaded in {wide}, but its embeddings and norms are in float32 now, as "
            f"peft.prepare_model_for_kbit_training leaves them; a step then takes about 60 % longer. Leave that call "
            f"out: prepare freezes the model by itself"
        )
    return tuple(lines)


def upcast(base: nn.Module) -> str | None:
    """The 16-bit dtype that a model was loaded in, if its unpacked weights have been converted to float32 since."""
    dtype = getattr(getattr(base, "config", None), "dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    embedding = next(iter(token_layers(base)), None)
    weight = getattr(embedding, "weight", None)
    is_wide = isinstance(weight, torch.Tensor) and weight.dtype == torch.float32 and not weight.requires_grad
    return dtype_name(dtype) if is_wide else None


# ---- an adapter that is there ----------------------------------------------------------------------------------------


def _check_same_adapter(model: Any, base: nn.Module, asked: LoraConfig, given: set[str] | None) -> None:
    """Refuse options that differ from those of the adapter that the model has.

    Args:
        given: for an adapter that `prepare` did not make, the options to compare; None: all
    """
    before = getattr(model, "nf4lora_asked", None)
    is_ours = before is not None
    before = before or model.active_peft_config
    for option in [field.name for field in fields(asked) if field.name not in NOT_ASKED]:
        if not is_ours and given is not None and option not in given:
            continue
        old, new = plain(getattr(before, option)), plain(getattr(asked, option))
        if option == "target_modules" and not is_ours:
            # PEFT replaces "all-linear" by names, and long lists by shorter ones: so compare the modules they match.
            old, new = (sorted(matched(base, config)) for config in (before, asked))
        if old != new:
            old, new = (plain(getattr(config, option)) for config in (before, asked))
            raise ValueError(
                f"prepare: {option} must be that of the adapter which the model carries, {old!r}, got {new!r}; give "
                f"the same options again, or call model.unload() first to start anew"
            )
