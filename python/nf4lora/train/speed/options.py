"""Which of the options for speed can be had, found out before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nf4lora.train.errors import UsageError
from nf4lora.train.settings import TrainConfig, default, without
from nf4lora.train.speed import attention, compiled, graphs, liger

if TYPE_CHECKING:
    import torch

NAMES = ("attn_implementation", "use_liger_kernel", "torch_compile", "cuda_graphs")


def for_machine(config: TrainConfig, kind: str, dtype: torch.dtype) -> tuple[TrainConfig, list[str]]:
    """The configuration with what this machine can do, and what is to be said about the rest.

    An option that the user has asked for by its own name is an error where it cannot be had. One that a key of another
    tool stands for is left out: it changes only the time that a run takes, and such a file is to work everywhere.

    Args:
        kind: cpu or cuda

    Raises:
        UsageError: naming the option and what it needs.
    """
    return _available(
        config,
        {
            "attn_implementation": lambda: attention.missing(config.attn_implementation or "", kind, dtype),
            "use_liger_kernel": lambda: liger.missing(kind),
            "torch_compile": lambda: compiled.missing(kind),
            "cuda_graphs": lambda: graphs.missing(kind),
        },
    )


def for_model(config: TrainConfig, model_type: str) -> tuple[TrainConfig, list[str]]:
    """The same for what only the model can say, by its configuration."""
    return _available(config, {"use_liger_kernel": lambda: liger.unknown(model_type)})


def _available(config: TrainConfig, missing: dict[str, Callable[[], str]]) -> tuple[TrainConfig, list[str]]:
    notes = []
    for name, find in missing.items():
        value: Any = getattr(config, name)
        if value == default(name) or not (why := find()):
            continue
        text = f"{name} {value}: {why}" if isinstance(value, str) else f"{name}: {why}"
        if name in config.given:
            raise UsageError(text)
        notes.append(f"not used: {text}")
        config = without(config, name)
    return config, notes


def shown(config: TrainConfig) -> str:
    """The options that are on, in a line; nothing where none is."""
    values = {name: getattr(config, name) for name in NAMES if getattr(config, name) != default(name)}
    return ", ".join(f"{name} {value}" if isinstance(value, str) else name for name, value in values.items())
