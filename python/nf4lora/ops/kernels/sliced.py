"""lora_linear and its backward for many rows: W is unpacked a slice at a time, and torch multiplies each slice.

A slice is so large that it holds all of W in nearly every layer: one unpacking, one product. The low-rank term is
written first and the product with W added to it: it is rounded relative to itself and then once more with y, so that a
small one is not lost as it would be if it were added to a rounded y. Partial sums are torch's own: float32, unless
torch.backends.cuda.matmul allows reductions in 16 bits.

CPU tensors run through the same code, where the tests hold it against the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nf4lora.ops.arguments import LoraLinear, LoraLinearBackward, Packed
from nf4lora.ops.kernels import dispatch, unfused
from nf4lora.ops.nf4 import BLOCKSIZES

_ops = torch.ops.nf4lora
_check = torch.ops.nf4lora_check  # csrc/check/ops.cpp

# Of one slice, so the most memory that unpacked weights take. The largest layer of a model of 70 billion weights,
# 28672 x 8192, has 470 MB in 16 bits. A slice costs the host about 0.1 ms of launches and Python (H200), which slices
# of 16 MB paid up to eight times a layer; a product of the whole of W also fills the card better than those of parts.
SLICE_BYTES = 512 << 20
_STEP = 64  # rows or columns: whole tiles of a matmul, and 16-byte alignment inside y and dx

_UNIT = BLOCKSIZES[0]  # columns that share an absmax whatever the blocksize: the smallest one


class Rectangle(NamedTuple):
    """Rows and columns of W."""

    n: slice
    k: slice

    def shape(self) -> tuple[int, int]:
        return self.n.stop - self.n.start, self.k.stop - self.k.start


def lora_linear(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """y = x W^T + bias + scaling * S B^T and S = dropout(x) A^T; arguments and results as in ops.lora_linear.

    Returns:
        y: [..., N] of x's dtype
        S: [M, R] of x's dtype, R = 0 without LoRA
    """
    a = LoraLinear(*arguments, **options)
    _check.lora_linear(*a)
    x, N, K = a.x, len(a.qweight), a.x.shape[-1]
    rows = unfused.as_rows(x).contiguous()  # once: torch would copy awkward strides again for each slice
    S = low_rank(a, rows)
    y = rows.new_empty(len(rows), N)
    offset = None if a.bias is None else a.bias.to(x.dtype)
    beta = 1.0
    if a.lora_B is None:
        if offset is None:
            beta = 0.0  # what y holds is not read
        else:
            y.copy_(offset)
    elif offset is None:
        y.addmm_(S, a.lora_B.to(x.dtype).T, beta=0.0, alpha=a.scaling)
    else:
        torch.addmm(offset, S, a.lora_B.to(x.dtype).T, alpha=a.scaling, out=y)
    if len(rows) > 0:
        rectangles = [Rectangle(n, slice(0, K)) for n in _parts(N, K * x.element_size())]
        for (n, _), W in unpacked(Packed.of(a), rectangles, rows):
            y[:, n].addmm_(rows, W.T, beta=beta)
    return y.reshape(*x.shape[:-1], N), S


def lora_linear_backward(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lora_linear: dx = dy W + mask * scaling * T A, dA = scaling * T^T (mask * x), dB = scaling * dy^T S.

    T = dy B is rounded to x's dtype; mask is 0 or 1 / (1 - dropout).

    Returns:
        dx: x's shape and dtype; [0] unless need_dx
        dA, dB: shapes and dtypes of lora_A and lora_B; [0] without LoRA, dA without x, dB without S
    """
    a = LoraLinearBackward(*arguments, **options)
    _check.lora_linear_backward(*a)
    dy, N, K = a.dy, len(a.qweight), 2 * a.qweight.shape[1]
    grad, rows = unfused.as_rows(dy).contiguous(), None if a.x is None else unfused.as_rows(a.x).contiguous()
    T, dA, dB = low_rank_backward(a, grad, rows)
    if not a.need_dx:
        return dy.new_empty(0), dA, dB
    shape = unfused.dx_shape(a)
    if N == 0:
        return dy.new_zeros(shape), dA, dB
    dx = grad.new_empty(len(grad), K)
    if a.lora_A is not None:
        dx.addmm_(T, a.lora_A.to(dy.dtype), beta=0.0, alpha=a.scaling / (1.0 - a.dropout))
        if a.dropout > 0:
            for part in unfused.slices_of(dx, grad.T):
                dx[part].masked_fill_(~unfused.mask(dx, part, a.dropout, a.seed), 0.0)
    if len(grad) > 0:
        rectangles = [Rectangle(slice(0, N), k) for k in _parts(K, N * dy.element_size())]
        for (_, k), W in unpacked(Packed.of(a), rectangles, grad):
            dx[:, k].addmm_(grad, W, beta=0.0 if a.lora_A is None else 1.0)
    return dx.reshape(shape), dA, dB


def low_rank(a: LoraLinear, rows: Tensor) -> Tensor:
    """S; arguments and result as in unfused.low_rank."""
    if a.lora_A is not None and dispatch.takes_low_rank(rows):
        return torch.ops.nf4lora_cuda.lora_low_rank(rows, *a[1:])
    return unfused.low_rank(a, rows)


def low_rank_backward(a: LoraLinearBackward, grad: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """T, dA and dB; arguments and results as in unfused.low_rank_backward."""
    taken = dispatch.takes_low_rank(grad) and (rows is None or dispatch.takes_low_rank(rows))
    if a.lora_A is not None and taken:
        return torch.ops.nf4lora_cuda.lora_low_rank_backward(grad, rows, *a[2:])
    return unfused.low_rank_backward(a, grad, rows)


def unpacked(packed: Packed, rectangles: list[Rectangle], like: Tensor) -> Iterator[tuple[Rectangle, Tensor]]:
    """Each rectangle with its part of W, [rows, columns] of like's dtype, which holds until the next one is asked for.

    All parts share one buffer, and all work is on the current stream. (Unpacking the next part on a second stream gains
    nothing: the blocks of a product take all registers of a card, so that others wait until one of them has ended.)
    """
    size = max((rows * columns for rows, columns in (r.shape() for r in rectangles)), default=0)
    buffer = like.new_empty(size)
    packed = Packed(packed.qweight.contiguous(), packed.absmax.contiguous(), packed.nested, packed.blocksize)
    for rectangle in rectangles:
        rows, columns = rectangle.shape()
        part = buffer[: rows * columns].view(rows, columns)
        unpack(packed, rectangle, part)
        yield rectangle, part


def unpack(packed: Packed, rectangle: Rectangle, out: Tensor) -> None:
    """out = W[n, k] to the bit; k begins and ends at a multiple of 32."""
    qweight, absmax, nested, blocksize = packed
    n, k = rectangle
    if out.is_cuda:
        torch.ops.nf4lora_cuda.lora_slice(qweight, absmax, nested, blocksize, n.start, k.start, out)
        return
    if nested is not None:
        absmax = _ops.absmax_dequantize(absmax, nested)
    scales = absmax.reshape(len(qweight), -1).repeat_interleave(blocksize // _UNIT, dim=1)
    codes = qweight[n, k.start // 2 : k.stop // 2].contiguous()
    scales = scales[n, k.start // _UNIT : k.stop // _UNIT].contiguous()
    _ops.nf4_dequantize.out(codes, scales, _UNIT, out=out)


def _parts(length: int, nbytes: int) -> list[slice]:
    """Slices of rows or columns of `nbytes` each, all about as long, none above SLICE_BYTES if _STEP allows."""
    most = max(_STEP, SLICE_BYTES // max(nbytes, 1) // _STEP * _STEP)
    count = max(1, -(-length // most))
    step = max(1, -(-length // (count * _STEP))) * _STEP
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
