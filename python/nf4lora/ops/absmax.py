"""absmax: the scales of a weight, quantised again."""

from __future__ import annotations

import torch
from torch import Tensor

from nf4lora import _C

_ops = torch.ops.nf4lora
NESTED_BLOCKSIZE: int = _C.NESTED_BLOCKSIZE


def absmax_quantize(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the scales again, to 8 bits each (double quantisation).

    The mean is subtracted (summed in float64, stored as the offset); then each block of 256 is scaled by its largest
    magnitude and takes the nearest value of the signed dynamic 8-bit map, a tie the lower one.

    Args:
        absmax: any shape, float32, finite, and so are their distances from the mean

    Returns:
        absmax_q: the same shape, uint8
        nested: [ceil(n/256) + 1] float32, one scale per 256 values, the offset last

    Raises:
        ValueError: NaN or Inf in absmax, or values of both signs further than 3.4e38 from the mean.
        TypeError: absmax is not float32.

    Source: QLoRA (arXiv:2305.14314), section 3; the map: arXiv:2110.02861, section 1.3.

    >>> absmax_q, nested = absmax_quantize(torch.tensor([1.0, 2.0, 3.0]))
    >>> absmax_q, nested
    (tensor([  0, 127, 255], dtype=torch.uint8), tensor([1., 2.]))
    """
    return _ops.absmax_quantize(absmax.detach())


@torch.library.register_fake("nf4lora::absmax_quantize")
def _(absmax):
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(
        [(absmax.numel() + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE + 1], dtype=torch.float32
    )


def absmax_dequantize(absmax_q: Tensor, nested: Tensor) -> Tensor:
    """Decode double-quantised scales: `RN(RN(map[q] * nested) + offset)`, two roundings.

    Args:
        absmax_q: any shape, uint8
        nested: [ceil(n/256) + 1] float32, the offset last

    Returns:
        absmax: the shape of absmax_q, float32

    Raises:
        ValueError: nested is not as long as absmax_q asks for.
        TypeError: another dtype.

    >>> absmax_dequantize(*absmax_quantize(torch.tensor([2.0, 2.0, 3.5])))
    tensor([1.9992, 1.9992, 3.5000])
    """
    return _ops.absmax_dequantize(absmax_q, nested)


@torch.library.register_fake("nf4lora::absmax_dequantize")
def _(absmax_q, nested):
    return absmax_q.new_empty(absmax_q.shape, dtype=torch.float32)
