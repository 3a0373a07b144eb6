"""Pages of 2 MB under packed weights that come from a file.

A loaded tensor lies in the mapped file, in pages of 4 KB. A generated token reads every weight once, and with pages of
2 MB the processor translates 512 times fewer addresses. Weights that nf4lora packs itself get such pages from
`nf4_quantize`. Where the system has no such pages, and for tensors smaller than one page, nothing is copied.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def has_huge_pages() -> bool:
    """Whether the system gives pages of 2 MB on request: Linux does, unless its setting is [never]."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in SETTING.read_text()
    except OSError:
        return False


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of the tensor in pages of 2 MB, if the system has them and the tensor fills one; else the tensor itself.

    >>> small = torch.zeros(3)
    >>> in_huge_pages(small) is small
    True
    """
    if tensor.device.type != "cpu" or tensor.nbytes < HUGE_PAGE or not has_huge_pages():
        return tensor
    # One page more than needed, so that the tensor can begin at a page's start; what is not written takes no memory.
    memory = mmap.mmap(-1, tensor.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)
