"""W as the dense kernel has unpacked it, kept from a forward pass that is computed again to its backward pass.

Activation checkpointing computes a part of the model again when its backward pass begins, which then unpacks the same
weights once more. That is spared where all weights of the part fit into a few hundred MB (csrc/cuda/kept_weights.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nf4lora import _C
from nf4lora.compat.torch import after_backward, running_backward

MOST_BYTES = 512 << 20  # all layers of a block of an 8B model have 436 MB in 16 bits
SHARE = 48  # of a card's memory, at most one part in so many

_known: int | None = None  # the backward pass that weights are kept for
_limit: int | None = None


def keep_if_computed_again(x: Tensor) -> None:
    """To be called before a forward pass of a layer on a card that records gradients."""
    global _known
    backward = running_backward()
    if backward is None and _known is not None:  # a backward pass that failed has left its own
        _drop()
    if backward is None or torch.cuda.is_current_stream_capturing():  # a graph's memory is not to be handed on
        return
    limit = min(MOST_BYTES, torch.cuda.get_device_properties(x.device).total_memory // SHARE)
    _C.set_most_kept_cuda_bytes(limit if _limit is None else _limit)
    if backward != _known:
        _drop()
        after_backward(_drop)
        _known = backward
    _C.keep_next_cuda_weight()


def _drop() -> None:
    global _known
    _C.drop_kept_cuda_weights()
    _known = None


def limit_kept_weights(nbytes: int | None) -> None:
    """The bytes that kept weights may take, of all layers together; 0: none is kept, None: what is usual."""
    global _limit
    _limit = nbytes
