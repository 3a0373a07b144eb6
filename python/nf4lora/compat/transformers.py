"""What is used of transformers beyond its public interface, each thing in one place.

Tried with transformers 5.17 to 5.24. `tests/test_compat.py` fails where one of these names has gone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# ---- what a checkpoint held


def was_loaded(parameter: torch.Tensor) -> bool:
    """Whether a parameter was set from a file; what is on meta is offloaded, and accelerate has it."""
    return getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta


def is_initialized(module: nn.Module) -> bool:
    """Whether transformers has loaded or initialised a module, and will leave it as it is."""
    return bool(vars(module).get("_is_hf_initialized", False))


def mark_initialized(part: nn.Module | nn.Parameter) -> None:
    """Keep transformers from drawing a module or a parameter at random."""
    part._is_hf_initialized = True  # type: ignore[assignment, union-attr]


def before_missing_are_drawn(note: Callable[[Any], None]) -> None:
    """Have transformers call `note(model)` while it loads one: what the file held is set and has its mark, and what it
    did not hold is still to be drawn at random. A second call with the same function does nothing, nor does a first one
    where a release of transformers has no such place."""
    original: Any = getattr(PreTrainedModel, "_initialize_missing_keys", None)
    if original is None or getattr(original, "noted_by", None) is note:
        return

    @functools.wraps(original)
    def initialize_missing_keys(self: Any, *args: Any, **kwargs: Any) -> Any:
        note(self)
        return original(self, *args, **kwargs)

    initialize_missing_keys.noted_by = note  # type: ignore[attr-defined]
    PreTrainedModel._initialize_missing_keys = initialize_missing_keys  # type: ignore[method-assign]


def computed_by_model(model: nn.Module) -> Callable[[str], bool]:
    """Whether a parameter of this name may be in no checkpoint because the model computes it itself."""
    patterns = [re.compile(each) for each in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)


# ---- how a model is saved and loaded


def kept_in_float32(model: nn.Module) -> list[str]:
    """Parts of the names of modules that the model's class loads in float32, whatever dtype is asked for."""
    return list(getattr(model, "_keep_in_fp32_modules", None) or [])


def mark_config_quantized(config: Any) -> None:
    """Have the configuration say that the model is quantised already, as a loaded one does."""
    config._is_quantized = True


def save_under_own_names(model: Any) -> None:
    """Leave the parameters their own names when the model is saved: no way back to the names of the file it was loaded
    from."""
    model._weight_conversions = []


def save_under_file_names(model: Any) -> None:
    """Undo `save_under_own_names`."""
    model.__dict__.pop("_weight_conversions", None)


def carries_adapter(model: Any) -> bool:
    """Whether `model.add_adapter` or `load_adapter` has put PEFT's layers into the model itself."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def path_of(config: Any) -> str | None:
    """The folder or the Hub id from which the configuration was loaded; None or "" for one that was written by hand."""
    return getattr(config, "_name_or_path", None)


def cached_file(name: str, file: str, revision: str | None) -> str | None:
    """Where a file of a checkpoint is on this disk, fetched if need be; None where it has none or cannot be asked."""
    from transformers.utils import cached_file as fetch

    return fetch(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
