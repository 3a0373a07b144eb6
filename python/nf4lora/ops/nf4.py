"""nf4: a weight in 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from nf4lora import _C

_ops = torch.ops.nf4lora
BLOCKSIZE: int = _C.BLOCKSIZE
BLOCKSIZES: tuple[int, ...] = _C.BLOCKSIZES


def nf4_quantize(weight: Tensor, blocksize: int = BLOCKSIZE) -> tuple[Tensor, Tensor]:
    """Pack a weight to 4 bits per value.

    `absmax` is the largest magnitude of a block of `blocksize` neighbours in a row, and each value becomes the index
    of the nearest NF4 code to `value / absmax`, a tie taking the lower one. Bytes and absmax are those of
    bitsandbytes. Not differentiable: gradients do not flow through it.

    Args:
        weight: [..., K] float32, bfloat16 or float16, finite; K a multiple of blocksize
        blocksize: a power of two between 32 and 4096

    Returns:
        qweight: [..., K/2] uint8, two codes a byte, the lower k in the high nibble
        absmax: [..., K/blocksize] float32

    Raises:
        ValueError: an illegal blocksize; K no multiple of it; NaN or Inf in weight.
        TypeError: a dtype that is none of the three.

    Source: QLoRA (arXiv:2305.14314), section 3 and appendix E.

    >>> qweight, absmax = nf4_quantize(torch.linspace(-2, 2, 64))
    >>> qweight.shape, absmax
    (torch.Size([32]), tensor([2.]))
    """
    return _ops.nf4_quantize(weight.detach(), blocksize)


@torch.library.register_fake("nf4lora::nf4_quantize")
def _(weight, blocksize):
    *lead, K = weight.shape
    return weight.new_empty([*lead, K // 2], dtype=torch.uint8), weight.new_empty(
        [*lead, K // blocksize], dtype=torch.float32
    )


def nf4_dequantize(
    qweight: Tensor,
    absmax: Tensor,
    blocksize: int = BLOCKSIZE,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Unpack a weight: `round_to_dtype(code[q] * absmax)`, one float32 multiply and one rounding.

    This is the weight that every other op computes with, on every device.

    Args:
        qweight: [..., K/2] uint8
        absmax: [..., K/blocksize] float32 (see absmax_dequantize for the double-quantised)
        dtype: float32, bfloat16 or float16; ignored where `out` is given
        out: [..., K] contiguous, of one of those dtypes, written instead of a new tensor

    Returns:
        weight: [..., K]

    Raises:
        ValueError: shapes that do not belong together; an illegal blocksize; another device.
        TypeError: a dtype that is not as above.

    >>> qweight, absmax = nf4_quantize(torch.tensor([2.0, -2.0] * 32))
    >>> nf4_dequantize(qweight, absmax)[:2]
    tensor([ 2., -2.], dtype=torch.bfloat16)
    """
    if out is None:
        return _ops.nf4_dequantize(qweight, absmax, blocksize, dtype)
    _ops.nf4_dequantize.out(qweight, absmax, blocksize, out=out)
    return out


@torch.library.register_fake("nf4lora::nf4_dequantize")
def _(qweight, absmax, blocksize, dtype):
    *lead, half = qweight.shape
    return qweight.new_empty([*lead, half * 2], dtype=dtype)


@torch.library.register_fake("nf4lora::nf4_dequantize.out")
def _(qweight, absmax, blocksize, *, out):
    return None
