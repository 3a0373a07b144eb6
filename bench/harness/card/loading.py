"""Loads the ops that were compiled for the card into a process that sees it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

NAME = "nf4lora_card_operators"  # as in operators.cpp


def load(library: Path | str) -> None:
    """Import nf4lora and let its ops for CUDA tensors launch their kernels on the card.

    `library` is that of build.operators, of the same nf4lora. torch then does without cuDNN, which brings a runtime of
    its own and finds no device: attention takes torch's own kernels.
    """
    import torch

    from nf4lora import _C, ops  # noqa: F401  # ops defines gradients, and comes first
    from nf4lora.ops.kernels import dispatch

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    loader = ExtensionFileLoader(NAME, str(library))
    with _quiet():  # torch says of each op that its kernel is replaced, which is what this is for
        module = module_from_spec(spec_from_loader(NAME, loader))  # type: ignore[arg-type]
        loader.exec_module(module)
    for name, function in vars(module).items():
        if callable(function) and hasattr(_C, name):
            setattr(_C, name, function)  # dispatch.py then rules over these ops
    dispatch.hand_over(dispatch.rules())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries write to the standard error."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
