"""The arguments of lora_linear and of its backward by name, as the ops, the gradient and the kernels pass them on.

In the order of the schemas in csrc/ops.cpp, so that `op(*arguments)` calls one. What each is: ops.lora_linear.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nf4lora.ops.nf4 import BLOCKSIZE


class LoraLinear(NamedTuple):
    x: Tensor
    qweight: Tensor
    absmax: Tensor
    nested: Tensor | None = None
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    seed: Tensor | None = None
    blocksize: int = BLOCKSIZE


class LoraLinearBackward(NamedTuple):
    """x: where dA is wanted; S: as the forward returned it, where dB is wanted."""

    dy: Tensor
    x: Tensor | None
    S: Tensor | None
    qweight: Tensor
    absmax: Tensor
    nested: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    seed: Tensor | None = None
    blocksize: int = BLOCKSIZE
    need_dx: bool = True
