"""PEFT's LoRA layer over an NF4Linear, computed by one fused op, and its registration with PEFT.

PEFT still creates, names, saves, switches and hot-swaps the adapters. Only the forward of one plain active adapter over
an `NF4Linear` changes: it becomes a single fused op. Importing this file imports PEFT, so other files import it inside
functions: `import nf4lora` must not import PEFT.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from nf4lora.adapters import siblings
from nf4lora.adapters.siblings import Branch
from nf4lora.compat.peft import AdapterDtype, Create, build_lora_layers, is_target
from nf4lora.compat.torch import children_of, has_hooks, hooks_every_module, is_called_plainly, parameters_of
from nf4lora.nn.linear import NF4Linear

SEEDS = 2**63 - 1
# PEFT's other methods whose layers call the base layer and do not use its weight, except for merging. The tests compare
# what each method computes over a packed layer and over the dequantised one (tests/test_peft_methods.py).
METHODS = {
    *("LORA", "ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY", "MISS", "OFT", "POLY"),
    *("PVERA", "RANDLORA", "ROAD", "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA"),
}
# PEFT's variants of LoRA that do not use the base weight, or that dequantise it; tests/test_peft_methods.py too.
VARIANTS = {"use_dora", "alora_invocation_tokens", "arrow_config", "monteclora_config"}
# For these PEFT computes A and B from the base weight, changes that weight, or casts A and B to its dtype.
INITS_OF_A_FLOAT_BASE = ("pissa", "olora", "corda", "mica", "loftq", "lora_ga", "orthogonal")


class NF4LoraLinear(AdapterDtype, lora.Linear):
    """PEFT's `lora.Linear` over an `NF4Linear`: one fused op, `y = x W^T + bias + scaling (dropout(x) A^T) B^T`.

    PEFT's own code runs, over the same base layer, for disabled or several active adapters, a mixed batch, DoRA and
    other variants, `lora_bias`, and hooks on the base layer or on the adapter's layers. Adapters stay in float32.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        check_init("NF4LoraLinear", config)
        check_variant("NF4LoraLinear", config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def adapter_dtype(self, base_layer: nn.Module, dtype: torch.dtype | None) -> torch.dtype | None:
        # PEFT would round a new or a loaded adapter to the base's compute_dtype.
        return None if isinstance(base_layer, NF4Linear) else dtype

    def branch(self) -> Branch | None:
        """What the fused op computes; None where PEFT's own forward must run.

        All of it is looked up at each call. That takes three microseconds, because the dictionaries of the modules are
        read, where an attribute of a module would take half a microsecond; and nothing can be out of date, whatever
        changes a layer: PEFT, accelerate, FSDP or a user.
        """
        if self.disable_adapters or self.merged_adapters:
            return None
        modules = children_of(self)
        layers_A, layers_B = children_of(modules["lora_A"]), children_of(modules["lora_B"])
        active = [name for name in self.active_adapters if name in layers_A]
        base = modules["base_layer"]
        if len(active) != 1 or not isinstance(base, NF4Linear) or has_hooks(base):
            return None
        (name,) = active
        lora_A, lora_B, dropout = layers_A[name], layers_B[name], children_of(modules["lora_dropout"])[name]
        scaling = self.scaling[name]
        plain = (
            name not in self.lora_variant
            and isinstance(scaling, (int, float))  # a tensor once PEFT's compiled hot-swap has prepared it
            and is_called_plainly(lora_A, nn.Linear)
            and is_called_plainly(lora_B, nn.Linear)
            and _parameter(lora_B, "bias") is None
        )
        if not plain:
            return None
        p = 0.0
        if type(dropout) is nn.Dropout and dropout.p < 1:
            p = dropout.p if dropout.training else 0.0
        elif not isinstance(dropout, nn.Identity):
            return None
        return Branch(base, _parameter(lora_A, "weight"), _parameter(lora_B, "weight"), scaling, p)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        branch = None if args or kwargs else self.branch()
        if branch is None:
            return super().forward(x, *args, **kwargs)
        has_siblings = not torch.compiler.is_compiling() and x.device.type in siblings.DEVICES
        y = siblings.output_of(self, x, branch) if has_siblings else None
        if y is None:
            y = self._computed(x, branch)
            if has_siblings:
                siblings.watched(self, x, y)
        return y

    def _computed(self, x: Tensor, branch: Branch) -> Tensor:
        base, A, B, scaling, p = branch
        # The seed comes from torch's generator, whose state checkpointing restores: it then draws the same mask again.
        seed = torch.randint(SEEDS, (1,), dtype=torch.int64, device=x.device) if p > 0 else None
        if A.dtype != torch.float32 or B.dtype != torch.float32:  # in FSDP's mixed precision
            A, B = A.float(), B.float()
        call: Any = base
        if is_called_plainly(base, NF4Linear) and not hooks_every_module():
            call = base.forward  # a call of a module takes a microsecond more
        # The adapter goes by keyword: global hooks of torch then get x as the only input, as from any linear layer.
        return call(x, lora_A=A, lora_B=B, scaling=scaling, dropout=p, seed=seed)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into a 16-bit base as PEFT does; refuse a packed one."""
        if isinstance(self.get_base_layer(), NF4Linear) and check_adapters_to_merge(self, adapter_names):
            # Every weight is a value of the NF4 code, and W + delta rounds back to W: the adapter loses 96 to 99.5 %.
            raise ValueError(
                "merge: the base must be in 16 or 32 bits, got NF4, where rounding to 4 bits would silently lose most "
                "of the adapter; call model.get_base_model().dequantize(), then model.merge_and_unload()"
            )
        super().merge(safe_merge, adapter_names)


def check_method(tuner: Any, model: nn.Module, adapter_name: str) -> None:
    """Refuse a method of PEFT that computes with the weights of its target layers, if one of them is packed."""
    config = tuner.peft_config[adapter_name]
    method = getattr(config.peft_type, "value", config.peft_type)
    if method in METHODS:
        return
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, NF4Linear) and _is_target(tuner, config, name):
            raise ValueError(
                f"{method}: target modules must be in 16 or 32 bits, got {name} in NF4, with whose weight this method "
                f"computes; use LoRA (nf4lora.prepare), one of {', '.join(sorted(METHODS - {'LORA'}))}, or load the "
                f"model without quantization_config"
            )


def _is_target(tuner: Any, config: Any, name: str) -> bool:
    targets = getattr(config, "target_modules", None)
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return True  # PEFT chooses linear layers later
    return is_target(tuner, config, name)


def check_init(who: str, config: LoraConfig) -> None:
    """Refuse initialisations of an adapter that need a base in floating point."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(INITS_OF_A_FLOAT_BASE):
        raise ValueError(
            f"{who}: init_lora_weights must be True, False, 'gaussian' or 'eva' on a base packed in NF4, got {init!r}, "
            f"which works on a floating-point base only"
        )


def check_variant(who: str, config: Any) -> None:
    """Refuse variants of LoRA that compute with the base weight, or use its dtype, which is that of the codes."""
    for option in fields(config):
        if option.metadata.get("is_lora_variant") and getattr(config, option.name) and option.name not in VARIANTS:
            raise ValueError(
                f"{who}: {option.name} must be left out on a base packed in NF4, got "
                f"{type(getattr(config, option.name)).__name__}, a variant of LoRA that needs a floating-point base; "
                f"plain LoRA and {', '.join(sorted(VARIANTS))} work on one"
            )


def _parameter(module: nn.Module, name: str) -> Any:
    """The module's attribute of this name; fast if it is a parameter, which it is unless FSDP flattens it."""
    parameters = parameters_of(module)
    return parameters[name] if name in parameters else getattr(module, name)


def install() -> None:
    """Make PEFT's LoRA put an `NF4LoraLinear` over every `NF4Linear`. A second call does nothing.

    Other methods of PEFT are checked when they are put on a model (`check_method`).

    One function of PEFT chooses the class of a new layer, `LoraModel._create_new_module`: `get_peft_model`,
    `PeftModel.from_pretrained`, `add_adapter`, transformers' `load_adapter` and TRL's `peft_config` all use it. (PEFT's
    own hook, `LoraConfig._register_custom_module`, does not survive saving an adapter.) Loading a model in NF4,
    `prepare` and `load_adapter` call this function; `import nf4lora` cannot, because it must not import PEFT.

    Raises:
        ImportError: this release of PEFT builds its layers in another way.
    """
    build_lora_layers(over_packed_layers, check_method)
    # PEFT's dequantize_module_weight() calls dequantize() of a layer that has an attribute W_q; DoRA then works. The
    # result is float32 (or the layer's compute_dtype), which PEFT rounds to the dtype of its own forward.
    NF4Linear.W_q = property(lambda layer: layer.weight)  # type: ignore[attr-defined]


def over_packed_layers(create: Create) -> Create:
    """PEFT's function that creates a LoRA layer, changed to make an `NF4LoraLinear` over an `NF4Linear`."""

    def create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, NF4Linear):
            return create(lora_config, adapter_name, target, **kwargs)
        if kwargs.pop("parameter_name", None) is not None:
            raise ValueError(
                "NF4LoraLinear: target_parameters must name floating-point parameters, got one packed in NF4; name its "
                "layer in target_modules instead"
            )
        return NF4LoraLinear(target, adapter_name, config=lora_config, **kwargs)

    return create_new_module


def fuse(model: nn.Module) -> int:
    """Give LoRA layers that PEFT made before `install`, or over bitsandbytes, the fused forward; returns how many."""
    changed = 0
    module: Any
    for module in model.modules():
        plain = type(module) is lora.Linear
        from_bnb = type(module).__module__ == "peft.tuners.lora.bnb" and type(module).__name__ == "Linear4bit"
        if (plain or from_bnb) and isinstance(module.get_base_layer(), NF4Linear):
            module.__class__ = NF4LoraLinear
            module.is_target_conv_1d_layer = False  # the one attribute that PEFT's Linear4bit lacks
            changed += 1
    return changed
