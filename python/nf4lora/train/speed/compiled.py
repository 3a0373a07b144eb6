"""Regional torch.compile: each decoder block by itself, so that the time for compiling does not grow with the depth.

All blocks of a model are one program to torch, which compiles it for the few cases that occur: with gradients and
without, and for the first block, whose input has none. Sizes are symbols from the start, so that rows of other lengths
need no new program, and a run that is resumed compiles the same one as the run before. A block is compiled in place:
names of its parameters stay what they are.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from nf4lora.train.errors import reason
from nf4lora.train.speed.blocks import decoder_blocks

# Random numbers as torch draws them without compiling: dropout then has the masks that it has otherwise.
OPTIONS: dict[str, Any] = {"fallback_random": True}


def compile_blocks(model: nn.Module) -> int:
    """Compile each decoder block at its first call; returns how many there are.

    Raises:
        RunError: the model names no blocks.
    """
    blocks = decoder_blocks(model, "torch_compile")
    for block in blocks.values():
        block.compile(dynamic=True, options=OPTIONS)
    return len(blocks)


def missing(kind: str) -> str:
    """Why nothing can be compiled for this device, as a sentence; nothing where it can."""
    import torch

    number = int.from_bytes(os.urandom(3), "big")  # torch keeps what it has compiled: this program is always another

    def trial(x: Tensor) -> Tensor:
        return (x * number).exp() + x

    try:
        torch.compile(trial, dynamic=False)(torch.ones(8, device=kind))
    except Exception as error:
        needs = "Triton and a C compiler" if kind == "cuda" else "a C++ compiler (g++) and Python's headers"
        return f"torch.compile needs {needs}, and a small trial of it failed ({reason(error)}); use torch_compile false"
    return ""
