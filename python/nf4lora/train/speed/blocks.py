"""The decoder blocks of a model: the layers of one kind that its hidden states pass through, one after the other."""

from __future__ import annotations

from torch import nn

from nf4lora.compat.transformers import classes_of_blocks
from nf4lora.nn.model_tree import base_of
from nf4lora.train.errors import RunError


def decoder_blocks(model: nn.Module, option: str) -> dict[str, nn.Module]:
    """The blocks by name, in module order, those of a vision tower included.

    Args:
        option: the name of the option that needs them, for the error

    Raises:
        RunError: transformers names none for this model.
    """
    base = base_of(model)
    classes = classes_of_blocks(base)
    blocks = {
        f"{name}.{key}": block
        for name, modules in base.named_modules()
        if isinstance(modules, nn.ModuleList)
        for key, block in modules.named_children()
        if type(block).__name__ in classes
    }
    if not blocks:
        raise RunError(f"{option}: {type(base).__name__} names no blocks that repeat; use {option} false")
    return blocks
