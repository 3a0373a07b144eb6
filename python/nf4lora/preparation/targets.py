"""Which modules of a model get adapters: those that the configuration selects, unless an adapter is not possible."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from nf4lora.compat.accelerate import has_hook
from nf4lora.compat.peft import check_target
from nf4lora.compat.torch import bare_copy
from nf4lora.nn.linear import NF4Linear
from nf4lora.nn.model_tree import adapter_names, base_name, evaluating, output_head
from nf4lora.preparation.task import text_part
from nf4lora.quantization import bitsandbytes_format
from nf4lora.quantization.weight_readers import read_weights

if TYPE_CHECKING:
    from peft import LoraConfig

# Classes that PEFT can wrap in a LoRA layer.
ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


@dataclass(frozen=True)
class Targets:
    """The modules that get adapters, and those that the configuration names but that get none."""

    names: frozenset[str]
    target_modules: Any  # this option of PEFT and the next one select the same modules when the adapter is loaded
    exclude_modules: Any
    text_part: str | None  # the part of a multimodal model that adapters are limited to
    left_out: dict[str, str]  # reason by name
    idle: tuple[str, ...]  # targets that match no module


def find_targets(base: nn.Module, lora_config: LoraConfig) -> Targets:
    """Find the modules that a configuration selects, as PEFT will.

    In a multimodal model only the text part gets adapters, since training on text reaches no other part, unless a
    target names a module outside of it. "all-linear" leaves out layers that are not plain linear layers, such as
    routers, and layers that PEFT does not allow for the model's family.

    Raises:
        ValueError: nothing matches, or the output head does.
    """
    config, everything = _resolved(base, lora_config), _named(base)
    asked = {name for name in everything if matches(config, name)}
    all_linear = _is_all_linear(lora_config)
    head = head_name(base)
    if head in asked:
        raise ValueError(
            f"prepare: target_modules must not name the output head, got {head!r}; trainers multiply by its weight "
            f"directly and would never use the adapter. To train it in full: modules_to_save=[{head!r}]"
        )
    part = None if isinstance(lora_config.target_modules, str) and not all_linear else text_part(base)
    inside = {name for name in asked if part is None or name.startswith(f"{part}.")}
    outside, carrying = asked - inside, set(inside)
    named: list[str] = []
    if outside and not all_linear:
        named = [target for target in sorted(config.target_modules or ()) if not _hits(target, inside)]
        carrying |= {name for name in outside if any(_hits(target, {name}) for target in named)}
    readers = read_weights(base) if all_linear else {}
    left_out = {}
    for name in sorted(carrying):
        if reason := _refusal(base, config, everything[name], name, all_linear):
            left_out[name] = reason
        elif (reader := readers.get(id(everything[name]))) and reader.numbers:
            left_out[name] = f"{reader} directly, and would not use an adapter"
    carrying -= left_out.keys()
    # In PEFT a layer that is trained in full gets no adapter.
    in_full = _matched_without_full_training(config, everything) - asked
    if not carrying and not config.target_parameters:
        reasons = {*left_out.values(), *(f"{name} is trained in full already" for name in in_full)}
        linear = sorted({name.rpartition(".")[2] for name in linear_names(base)} - {head})
        given, because = plain(lora_config.target_modules), "".join(f"; {reason}" for reason in sorted(reasons)[:3])
        raise ValueError(
            f"prepare: target_modules must match a module{' that can carry an adapter' if reasons else ''}, got "
            f"{given!r}{because or ', which matches none'}; the linear layers are called {', '.join(linear)}"
        )
    idle: tuple[str, ...] = ()
    if not isinstance(config.target_modules, str) and not all_linear:
        targets = sorted(config.target_modules or ())
        idle = tuple(target for target in targets if not _hits(target, asked | in_full))
    confined = part if outside - carrying else None
    return Targets(
        names=frozenset(carrying),
        target_modules=_names_for_peft(base, lora_config, carrying) if all_linear else lora_config.target_modules,
        exclude_modules=lora_config.exclude_modules
        if all_linear
        else _exclusion(lora_config.exclude_modules, confined, named, list(left_out), carrying),
        text_part=confined,
        left_out=left_out,
        idle=idle,
    )


def matched(base: nn.Module, lora_config: LoraConfig) -> set[str]:
    """Names of the modules that a configuration selects, by PEFT's rules."""
    config = _resolved(base, lora_config)
    return {name for name in _named(base) if matches(config, name)}


def matches(config: Any, name: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, name))


def linear_names(base: nn.Module) -> set[str]:
    return {name for name, module in _named(base).items() if isinstance(module, (nn.Linear, Conv1D))}


def head_name(base: nn.Module) -> str | None:
    head = output_head(base)
    return next((base_name(name) for name, module in base.named_modules() if head is not None and module is head), None)


def plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) and all(isinstance(v, str) for v in value) else value


def is_linear(layer: nn.Linear) -> bool:
    """Whether a layer computes what torch.nn.Linear does. A class with its own forward is tested on a small copy."""
    has_own_forward = type(layer).forward is not nn.Linear.forward
    if not has_own_forward or isinstance(layer, NF4Linear) or bitsandbytes_format.is_linear4bit(layer):
        return True
    if "forward" in vars(layer) and not has_hook(layer):  # somebody's own, in place of that of the class
        return False
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            bias = None if layer.bias is None else nn.Parameter(torch.randn(6))
            small = bare_copy(layer, {"weight": nn.Parameter(torch.randn(6, 8)), "bias": bias}, {})
            small.in_features, small.out_features = 8, 6
            x = torch.randn(2, 3, 8)
            with evaluating(small):
                y = small.forward(x)
            expected = F.linear(x, small.weight, small.bias)
    except Exception:  # the forward needs more than a weight and a bias: it is not that of a linear layer
        return False
    return isinstance(y, torch.Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)


# ---- details ---------------------------------------------------------------------------------------------------------


def _matched_without_full_training(config: Any, names: Iterable[str]) -> set[str]:
    alone = copy.copy(config)
    alone.modules_to_save = None
    return {name for name in names if matches(alone, name)}


def _is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _named(base: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by their names without PEFT; for a layer that PEFT has wrapped, the inner layer."""
    of_adapters = adapter_names(base)
    return {base_name(name): module for name, module in base.named_modules() if name and name not in of_adapters}


def _resolved(base: nn.Module, lora_config: LoraConfig) -> Any:
    """A copy of the configuration in which target_modules is not None or "all-linear"."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CUSTOMARY

    config: Any = copy.copy(lora_config)
    if config.target_modules is None and not config.target_parameters:
        family = getattr(getattr(base, "config", None), "model_type", None)
        if family not in CUSTOMARY:
            raise ValueError(
                f"prepare: target_modules must be given for {type(base).__name__}, got None; try 'all-linear'"
            )
        config.target_modules = set(CUSTOMARY[family])
    elif _is_all_linear(config):
        config.target_modules = linear_names(base) - {head_name(base)}
    return config


def _hits(target: str, names: set[str] | frozenset[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _refusal(base: nn.Module, config: Any, module: nn.Module, name: str, all_linear: bool) -> str | None:
    """Why a module that the configuration names gets no adapter; None where it gets one."""
    if not isinstance(module, ADAPTABLE) and not hasattr(module, "base_layer"):
        return f"PEFT cannot put an adapter on {type(module).__name__}"
    if not all_linear:
        return None  # the user has named this layer: PEFT wraps it or raises its own error
    if isinstance(module, nn.Linear) and not is_linear(module):
        return f"{type(module).__name__} computes something else than a linear layer"
    try:
        check_target(config, base, name.rpartition(".")[2])
    except ValueError:
        return f"PEFT allows no adapter on {name.rpartition('.')[2]} of {base.config.model_type}"  # type: ignore[union-attr]
    return None


def _names_for_peft(base: nn.Module, config: LoraConfig, carrying: set[str]) -> Any:
    """ "all-linear", if PEFT selects the same layers for it, else their names."""
    return config.target_modules if carrying == linear_names(base) - {head_name(base)} else carrying


def _exclusion(
    given: list[str] | str | None, part: str | None, named: list[str], left_out: list[str], carrying: set[str]
) -> list[str] | str | None:
    """The value for PEFT's exclude_modules: one pattern that matches the full names of all modules to leave out."""
    patterns: list[str] = []
    if part is not None:
        also = "".join(rf"|(.*\.)?{re.escape(target)}$" for target in named)
        patterns.append(rf"(?!{re.escape(part)}\.{also}).*")
    for exact in map(re.escape, left_out):
        of_all_layers = re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", exact)
        pattern = exact if any(re.fullmatch(of_all_layers, name) for name in carrying) else of_all_layers
        patterns += [pattern] if pattern not in patterns else []
    if not patterns:
        return given
    if isinstance(given, str):
        patterns.append(given)
    else:
        patterns += [rf"(.*\.)?{re.escape(name)}" for name in given or ()]
    return "|".join(f"({pattern})" for pattern in patterns) if len(patterns) > 1 else patterns[0]
