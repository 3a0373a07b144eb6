"""Bounds oneDNN's caches of compiled matrix products, which batches of changing lengths fill.

On an x86 processor torch passes products of bfloat16 matrices, and convolutions, to oneDNN. oneDNN compiles code for
each shape that it meets and keeps it, up to 1,024 products in each of two caches. Every new batch length adds about ten
products of 0.7 MB and more. They lie between the tensors on the heap, so that free pieces there cannot join. A run of
batches of 60 to 170 tokens grows by two gigabytes in 100 steps (`python -m bench soak`), while compiling a product
again takes a third of a millisecond. The caches read their size from two environment variables at their first use; the
size can be neither changed nor read later.
"""

from __future__ import annotations

import os

import torch

from nf4lora.compat.torch import onednn_linear

CAPACITY = 16  # products; the layers share them, and need fewer for batches of one length
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own cache, and torch's in front of it

_bounded = False


def bound_caches() -> None:
    """Keep oneDNN's caches small in this process, unless they are in use already. A second call does nothing.

    A variable that the user has set keeps its value. The environment is unchanged afterwards.
    """
    global _bounded
    if _bounded or not torch.backends.mkldnn.is_available():
        return
    _bounded = True
    names = [name for name in VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(names, str(CAPACITY)))
    try:
        _use_caches()
    finally:
        for name in names:
            del os.environ[name]


def _use_caches() -> None:
    """Compute products that are too small to wake another thread, so that the process can still be forked safely.

    torch has a cache for each kind of product and each thread; training steps use the second kind here, in the thread
    that calls backward().
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        vector, matrix = torch.zeros(1, 1), torch.zeros(64, 64, dtype=torch.bfloat16)
        onednn_linear(vector, vector)
        torch.mm(matrix[:32], matrix)
