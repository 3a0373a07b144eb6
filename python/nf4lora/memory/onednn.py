"""oneDNN's caches of compiled products, which batches of changing lengths fill.

On an x86 processor torch hands products of bfloat16 matrices, and convolutions, to oneDNN, which compiles code for the
shapes it meets and keeps it: up to 1,024 products, in each of two caches. Every new length of a batch adds some ten of
them, each of 0.7 MB and more, between tensors of the heap, which then cannot join its holes. A run of batches of 60 to
170 tokens grows by two gigabytes in 100 steps (`python -m bench soak`); compiling a product again takes a third of a
millisecond. The caches read their size from two environment variables when they are used for the first time; it cannot
be changed later, or asked.
"""

from __future__ import annotations

import os

import torch

from nf4lora.compat.torch import onednn_linear

CAPACITY = 16  # products: more than the layers of one length need, each layer the same ones
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own cache, and torch's in front of it

_bounded = False


def bound_caches() -> None:
    """Keep oneDNN's caches small in this process, where nothing has used them yet; a second call does nothing.

    What the user's environment says about them stands. The environment is afterwards as it was.
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
    """Products too small to wake another thread, so that a fork is still safe.

    torch has a cache for each kind of product and each thread; those of training steps are of the second kind here,
    in the thread that calls backward().
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        vector, matrix = torch.zeros(1, 1), torch.zeros(64, 64, dtype=torch.bfloat16)
        onednn_linear(vector, vector)
        torch.mm(matrix[:32], matrix)
