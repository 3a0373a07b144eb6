"""Returns free memory of the C heap to the system between training steps.

glibc keeps freed memory for itself. Tensors whose sizes change from step to step leave holes that later tensors do
not fit into, so that the heap grows for hundreds of steps. `malloc_trim` returns the pages of all holes, but touching
them again costs time. So this file calls it between steps, only when the process has grown, and so rarely that its
cost stays a small share of the run. On a machine without glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from typing import Any

import torch
from torch import nn

from nf4lora.compat.torch import forward_pre_hooks_of

SHARE = 0.02  # of the run's time that returning memory may cost
GROWTH = 1.1  # a call is worth its cost only above this multiple of the smallest size seen after returning memory
PAGE = mmap.PAGESIZE

enabled = True  # False: the heap is left alone
seconds = 0.0  # spent in malloc_trim so far

_next = 0.0  # time.monotonic() before which no memory is returned again
_smallest = 0.0  # the fewest bytes that the process held after memory was returned
_per_byte: float | None = None  # seconds to touch a byte of fresh memory


def trim() -> float:
    """Return every free page of the heap to the system; the result is the seconds that this took."""
    global seconds
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    start = time.perf_counter()
    if give_back is not None:
        give_back(0)
    took = time.perf_counter() - start
    seconds += took
    return took


def keep_small(model: nn.Module) -> None:
    """Return free memory between the training steps of this model, in any training loop. A second call does nothing."""
    if between_steps not in forward_pre_hooks_of(model).values():
        model.register_forward_pre_hook(between_steps)


def between_steps(model: nn.Module, _: Any) -> None:
    """Return memory if it is time to. Called at the start of a step, when the one before has freed its tensors."""
    global _next, _smallest
    if torch.compiler.is_compiling() or not (enabled and model.training and torch.is_grad_enabled()):
        return
    now = time.monotonic()
    if now < _next:
        return
    before = resident()
    if before < GROWTH * _smallest:
        return
    took = trim()
    after = resident()
    _smallest = min(_smallest, after) if _smallest else after
    _next = now + (took + (before - after) * seconds_per_byte()) / SHARE


def resident() -> int:
    """Bytes of resident memory of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:
        return 0


def seconds_per_byte() -> float:
    """Seconds that the system takes to provide a byte of fresh memory, measured once on 8 MB."""
    global _per_byte
    if _per_byte is None:
        size = 8 << 20
        with mmap.mmap(-1, size) as fresh:
            ones = bytes(size // PAGE)
            start = time.perf_counter()
            fresh[::PAGE] = ones  # a byte of every page
            _per_byte = (time.perf_counter() - start) / size
    return _per_byte
