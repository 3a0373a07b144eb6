"""lora_linear and its backward for CUDA in plain torch: the weight is dequantised whole, then cuBLAS multiplies.

It keeps the contract of the fused op (one W, rounded A, B, S and T, float32 sums, the same dropout mask) at the price
of a 16-bit copy of one weight at a time. dispatch.py takes it where no other kernel can
compute; called directly it runs on CPU tensors too, where the tests hold it against the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_ops = torch.ops.nf4lora
_check = torch.ops.nf4lora_check  # csrc/check.cpp

# Rows are taken in slices of about this many values, so that float32 sums and int64 random words stay small.
_SLICE = 1 << 24

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10


def lora_linear(
    x: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    blocksize: int,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + bias + scaling * S B^T and S = dropout(x) A^T; arguments and results as in ops.lora_linear.

    Returns:
        y: [..., N] of x's dtype
        S: [M, R] of x's dtype, R = 0 without LoRA
    """
    _check.lora_linear(x, qweight, absmax, nested, bias, lora_A, lora_B, dropout, seed, blocksize)
    rows = as_rows(x)
    W = _weight(qweight, absmax, nested, blocksize, x.dtype)
    S = rows.new_empty(len(rows), 0) if lora_A is None else low_rank(rows, lora_A, dropout, seed)
    y = rows.new_empty(len(rows), len(W))
    for part in slices_of(rows, W):
        total = _product(rows[part], W.T)
        if lora_B is not None:
            total.add_(_product(S[part], lora_B.to(x.dtype).T), alpha=scaling)
        if bias is not None:
            total.add_(bias)
        y[part] = total
    return y.reshape(*x.shape[:-1], len(W)), S


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    qweight: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    blocksize: int,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lora_linear: dx = dy W + mask * scaling * T A, dA = scaling * T^T (mask * x), dB = scaling * dy^T S.

    T = dy B is rounded to x's dtype; mask is 0 or 1 / (1 - dropout).

    Returns:
        dx: x's shape and dtype; [0] unless need_dx
        dA, dB: shapes and dtypes of lora_A and lora_B; [0] without LoRA, dA without x, dB without S
    """
    _check.lora_linear_backward(dy, x, S, qweight, absmax, nested, lora_A, lora_B, dropout, seed, blocksize)
    grad, rows = as_rows(dy), None if x is None else as_rows(x)
    T = dA = dB = dy.new_empty(0, dtype=torch.float32)
    if lora_A is not None and lora_B is not None:
        T, dA, dB = low_rank_backward(grad, rows, S, lora_A, lora_B, scaling, dropout, seed)
    if not need_dx:
        return dy.new_empty(0), dA, dB
    W = _weight(qweight, absmax, nested, blocksize, dy.dtype)
    dx = grad.new_empty(len(grad), W.shape[1])
    for part in slices_of(grad, W.T):
        total = _product(grad[part], W)
        if lora_A is not None:
            term = _product(T[part], lora_A.to(dy.dtype))
            if dropout > 0:
                term.masked_fill_(~mask(dx, part, dropout, seed), 0.0)
            total.add_(term, alpha=scaling / (1.0 - dropout))
        dx[part] = total
    return dx.reshape(dx_shape(dy, x, W.shape[1])), dA, dB


def as_rows(tensor: Tensor) -> Tensor:
    """All dimensions but the last as one."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # -1 could be any number where the last is 0


def dx_shape(dy: Tensor, x: Tensor | None, K: int) -> tuple[int, ...]:
    return tuple(x.shape) if x is not None else (*dy.shape[:-1], K)


def low_rank(rows: Tensor, lora_A: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """S = dropout(rows) A^T: [M, R] of the rows' dtype."""
    A = lora_A.to(rows.dtype)
    S = rows.new_empty(len(rows), len(A))
    for part in slices_of(rows, A):
        S[part] = _product(_dropped(rows, part, dropout, seed), A.T).mul_(1.0 / (1.0 - dropout))
    return S


def low_rank_backward(
    grad: Tensor,
    rows: Tensor | None,
    S: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """T = grad B of grad's dtype; dA and dB of the dtypes of lora_A and lora_B, empty without rows or without S."""
    B = lora_B.to(grad.dtype)
    T = grad.new_empty(len(grad), B.shape[1])
    dA, dB = (
        torch.zeros_like(factor, dtype=torch.float32) if given is not None else grad.new_empty(0, dtype=torch.float32)
        for factor, given in ((lora_A, rows), (lora_B, S))
    )
    for part in slices_of(grad, lora_A.T):
        T[part] = _product(grad[part], B)
        if rows is not None:
            dA.add_(_product(T[part].T, _dropped(rows, part, dropout, seed)), alpha=scaling / (1.0 - dropout))
        if S is not None:
            dB.add_(_product(grad[part].T, S[part]), alpha=scaling)
    return T, dA if rows is None else dA.to(lora_A.dtype), dB if S is None else dB.to(lora_B.dtype)


def _weight(qweight: Tensor, absmax: Tensor, nested: Tensor | None, blocksize: int, dtype: torch.dtype) -> Tensor:
    if nested is not None:
        absmax = _ops.absmax_dequantize(absmax, nested)
    return _ops.nf4_dequantize(qweight, absmax, blocksize, dtype)


def slices_of(rows: Tensor, other: Tensor) -> Iterator[slice]:
    """Slices of the rows, so that neither side of a slice's products exceeds _SLICE values."""
    step = max(1, _SLICE // max(rows.shape[-1], len(other), 1))
    return (slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and returned in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _dropped(rows: Tensor, part: slice, dropout: float, seed: Tensor | None) -> Tensor:
    """The rows with what dropout leaves out set to zero; the factor 1 / (1 - dropout) is applied in float32 later."""
    # Filled, not multiplied: zero times an infinity that is dropped would be NaN.
    return rows[part] if dropout == 0 else rows[part].masked_fill(~mask(rows, part, dropout, seed), 0.0)


def mask(rows: Tensor, part: slice, dropout: float, seed: Tensor | None) -> Tensor:
    """bool, the shape of rows[part]: True where kept, as csrc/format.h defines it."""
    assert seed is not None  # the check has seen to it
    K = rows.shape[1]
    threshold = min(int(dropout * 2.0**32 + 0.5), _WORD)
    words = _philox(seed.to(rows.device), part.start * K, part.stop * K)
    return (words >= threshold).reshape(part.stop - part.start, K)


def _philox(seed: Tensor, start: int, stop: int) -> Tensor:
    """Words start .. stop - 1 of Philox4x32-10(seed), int64 below 2^32; start and stop are multiples of 4.

    A product of two 32-bit words fits 64 bits; int64 holds the same bits, so its wrap-around does no harm.
    """
    block = torch.arange(start // 4, stop // 4, device=seed.device)
    c0, c1 = block & _WORD, block >> 32
    c2 = c3 = torch.zeros_like(block)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_PHILOX_ROUNDS):
        first, second = c0 * _PHILOX_MULTIPLIER[0], c2 * _PHILOX_MULTIPLIER[1]
        c0, c1, c2, c3 = second >> 32 & _WORD ^ c1 ^ k0, second & _WORD, first >> 32 & _WORD ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=1).flatten()
