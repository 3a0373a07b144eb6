"""The private names of accelerate that nf4lora uses: the hook of a module whose model is spread over devices.

`tests/test_compat.py` fails where accelerate has renamed it.
"""

from __future__ import annotations

from torch import nn

HOOK = "_hf_hook"  # attribute of a module whose forward accelerate has replaced


def has_hook(module: nn.Module) -> bool:
    """Whether accelerate has replaced the module's forward, to move weights or inputs to its device."""
    return HOOK in module.__dict__


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Move the hook of a module, if it has one, to the module that replaces it."""
    if not has_hook(old):
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hook = old.__dict__[HOOK]
    remove_hook_from_module(old)
    add_hook_to_module(new, hook)
