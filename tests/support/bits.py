"""Whether two tensors are the same to the bit, and where they first differ."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """The same shape, dtype and values; a NaN is like any NaN, and -0 is not 0.

    The message shows the first element that differs, both values and their bits, and how many differ.
    """
    __tracebackhide__ = True
    what = what and f"{what}: "
    assert actual.dtype == expected.dtype, f"{what}{actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}shape {list(actual.shape)} is not {list(expected.shape)}"
    actual, expected = (each.detach().cpu().contiguous() for each in (actual, expected))
    both = [each.view(BITS[each.element_size()]) for each in (actual, expected)]
    different = both[0] != both[1]
    if actual.is_floating_point():
        different &= ~(actual.isnan() & expected.isnan())
    if not different.any():
        return
    flat = int(different.flatten().nonzero()[0])
    index = [int(each) for each in torch.unravel_index(torch.tensor(flat), actual.shape)]
    width = 8 * actual.element_size()
    shown = [
        f"{values.flatten()[flat].item()!r} (bits {int(bits.flatten()[flat]) & (1 << width) - 1:#0{width // 4 + 2}x})"
        for values, bits in zip((actual, expected), both)
    ]
    count = f"{int(different.sum())} of {actual.numel()} values differ"
    raise AssertionError(f"{what}{count}, first at {index}: {shown[0]} is not {shown[1]}")
