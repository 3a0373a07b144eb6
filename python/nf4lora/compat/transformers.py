"""The private names of transformers that nf4lora uses, each in one place.

Tested with transformers 5.17 to 5.24. `tests/test_compat.py` fails where one of these names is gone.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

# ---- what a checkpoint held


def was_loaded(parameter: torch.Tensor) -> bool:
    """Whether a parameter was set from a file. A parameter on meta was: accelerate keeps its values elsewhere."""
    return getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta


def is_initialized(module: nn.Module) -> bool:
    """Whether transformers has loaded or initialised a module, and so will not initialise it again."""
    return bool(vars(module).get("_is_hf_initialized", False))


def mark_initialized(part: nn.Module | nn.Parameter) -> None:
    """Keep transformers from drawing a module or a parameter at random."""
    part._is_hf_initialized = True  # type: ignore[assignment, union-attr]


def before_missing_are_drawn(note: Callable[[Any], None]) -> None:
    """Have transformers call `note(model)` during each load, after it has set and marked the parameters that the file
    holds and before it draws the others at random. A second call with the same function does nothing, and neither does
    a first one where a release of transformers has no such step."""
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
    """Whether a checkpoint may lack a parameter because the model computes it: a function of the parameter's name."""
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def classes_of_blocks(model: nn.Module) -> set[str]:
    """Names of the classes that the model repeats: its decoder blocks, and what else must not be split over devices."""
    return set(getattr(model, "_no_split_modules", None) or ())


# ---- how a model is saved and loaded


def kept_in_float32(model: nn.Module) -> list[str]:
    """Parts of the names of modules that the model's class loads in float32, whatever dtype is asked for."""
    return list(getattr(model, "_keep_in_fp32_modules", None) or [])


def mark_config_quantized(config: Any) -> None:
    """Mark the configuration as that of a quantised model, as transformers does when it loads one."""
    config._is_quantized = True


def save_under_own_names(model: Any) -> None:
    """Save the model's parameters under their own names, not under the names in the file that it was loaded from."""
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
    """The local path of a checkpoint's file, downloaded if needed; None where it does not exist or cannot be had."""
    from transformers.utils import cached_file as fetch

    return fetch(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


# ---- masks


@contextlib.contextmanager
def known_batch(shape: torch.Size, padded: bool, packed: bool) -> Iterator[None]:
    """Build the attention masks of a batch [B, T] without asking the device whether its rows have padding or hold
    several samples: transformers waits for a GPU at each forward to decide whether it needs a mask.

    What transformers builds does not change. Where a release lacks one of its two functions, it asks as before.
    """
    names = ("fast_all", "find_packed_sequence_indices", "is_tracing")
    original = {name: getattr(masking_utils, name) for name in names if hasattr(masking_utils, name)}

    def fast_all(mask: Tensor) -> Any:
        return not padded if mask.shape == shape else original["fast_all"](mask)

    def find_packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
        if not packed:
            return None
        masking_utils.is_tracing = lambda *tensors: True  # type: ignore[assignment]  # else it looks for one sample
        try:
            return original["find_packed_sequence_indices"](position_ids)
        finally:
            masking_utils.is_tracing = original["is_tracing"]  # type: ignore[assignment]

    if "fast_all" in original:
        masking_utils.fast_all = fast_all  # type: ignore[assignment]
    if len(original.keys() & names[1:]) == 2:
        masking_utils.find_packed_sequence_indices = find_packed_sequence_indices  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(masking_utils, name, function)
