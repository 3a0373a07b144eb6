"""The private names of PEFT that nf4lora uses, each in one place.

Tested with PEFT 0.21 and transformers 5.17 to 5.24. `tests/test_compat.py` fails where one of these names is gone.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftConfig

Create = Callable[..., Any]  # (lora_config, adapter_name, target, **more) -> the layer with an adapter


def get_peft_model(model: nn.Module, config: PeftConfig, **options: Any) -> Any:
    """`peft.get_peft_model` without transformers' warning that PEFT reads an attribute by its former name."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, config, **options)  # type: ignore[arg-type]


def is_target(tuner: Any, config: Any, name: str) -> bool:
    """Whether a method of PEFT with this configuration puts an adapter on the module of this name."""
    return bool(tuner._check_target_module_exists(config, name))


def check_target(config: Any, base: nn.Module, name: str) -> None:
    """Ask PEFT whether it allows an adapter on a module, whose name is the last part of its full name.

    Raises:
        ValueError: PEFT does not allow one.
    """
    from peft.tuners.lora import LoraModel

    check: Any = getattr(LoraModel, "_check_target_module_compatiblity", None)
    if check is not None and len(inspect.signature(check).parameters) == 4:
        check(None, config, base, name)


def build_lora_layers(make: Callable[[Create], Create], check: Callable[[Any, nn.Module, str], None]) -> None:
    """Replace PEFT's function that creates LoRA layers by `make(create)`, where `create` is that function, and call
    `check(tuner, model, adapter_name)` before any method of PEFT is put on a model. A second call does nothing.

    Raises:
        ImportError: this release of PEFT builds its layers in another way.
    """
    import peft
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    original = LoraModel.__dict__.get("_create_new_module")
    if getattr(original, "installed_by_nf4lora", False):
        return
    expected = {"lora_config", "adapter_name", "target"}
    if not isinstance(original, staticmethod) or not expected <= set(inspect.signature(original).parameters):
        raise ImportError(
            f"nf4lora: peft must build its layers in LoraModel._create_new_module(lora_config, adapter_name, target), "
            f"got peft {peft.__version__}, which does not; install a release that nf4lora was tested with: "
            f"pip install 'peft>=0.21,<0.22'"
        )
    inject_adapter = BaseTuner.inject_adapter

    @functools.wraps(inject_adapter)
    def inject_checked(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check(self, model, adapter_name)
        inject_adapter(self, model, adapter_name, *args, **kwargs)

    BaseTuner.inject_adapter = inject_checked  # type: ignore[method-assign]
    replacement = staticmethod(make(original.__func__))
    replacement.installed_by_nf4lora = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = replacement  # type: ignore[method-assign,assignment]


class AdapterDtype:
    """Mixin that stands before PEFT's class of a LoRA layer: `adapter_dtype` chooses the dtype of its adapters."""

    def adapter_dtype(self, base_layer: nn.Module, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that adapters over this base get, where PEFT would take `dtype`; None: they keep their own."""
        return dtype

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)  # type: ignore[misc]
        return device, self.adapter_dtype(base_layer, dtype)
