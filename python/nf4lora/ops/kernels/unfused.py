"""lora_linear and its backward for CUDA in plain torch: the weight is dequantised whole, then cuBLAS multiplies.

It keeps the contract of the fused op (one W, rounded A, B, S and T, float32 sums, the same dropout mask) at the price
of a 16-bit copy of one weight at a time. dispatch.py takes it where no other kernel can compute. Called directly it
runs on CPU tensors too, where the tests hold it against the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nf4lora import _C
from nf4lora.ops.arguments import LoraLinear, LoraLinearBackward, Packed

_ops = torch.ops.nf4lora
_check = torch.ops.nf4lora_check  # csrc/check/ops.cpp

# Rows are taken in slices of about this many values, so that float32 sums and int64 random words stay small.
_SLICE = 1 << 24

_WORD = 0xFFFFFFFF


def lora_linear(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """y = x W^T + bias + scaling * S B^T and S = dropout(x) A^T; arguments and results as in ops.lora_linear.

    Returns:
        y: [..., N] of x's dtype
        S: [M, R] of x's dtype, R = 0 without LoRA
    """
    a = LoraLinear(*arguments, **options)
    _check.lora_linear(*a)
    rows = as_rows(a.x)
    W = _weight(Packed.of(a), a.x.dtype)
    S = low_rank(a, rows)
    y = rows.new_empty(len(rows), len(W))
    for part in slices_of(rows, W):
        total = _product(rows[part], W.T)
        if a.lora_B is not None:
            total.add_(_product(S[part], a.lora_B.to(a.x.dtype).T), alpha=a.scaling)
        if a.bias is not None:
            total.add_(a.bias)
        y[part] = total
    return y.reshape(*a.x.shape[:-1], len(W)), S


def lora_linear_backward(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lora_linear: dx = dy W + mask * scaling * T A, dA = scaling * T^T (mask * x), dB = scaling * dy^T S.

    T = dy B is rounded to x's dtype; mask is 0 or 1 / (1 - dropout).

    Returns:
        dx: x's shape and dtype; [0] unless need_dx
        dA, dB: shapes and dtypes of lora_A and lora_B; [0] without LoRA, dA without x, dB without S
    """
    a = LoraLinearBackward(*arguments, **options)
    _check.lora_linear_backward(*a)
    grad, rows = as_rows(a.dy), None if a.x is None else as_rows(a.x)
    T, dA, dB = low_rank_backward(a, grad, rows)
    if not a.need_dx:
        return a.dy.new_empty(0), dA, dB
    W = _weight(Packed.of(a), a.dy.dtype)
    dx = grad.new_empty(len(grad), W.shape[1])
    for part in slices_of(grad, W.T):
        total = _product(grad[part], W)
        if a.lora_A is not None:
            term = _product(T[part], a.lora_A.to(a.dy.dtype))
            if a.dropout > 0:
                term.masked_fill_(~mask(dx, part, a.dropout, a.seed), 0.0)
            total.add_(term, alpha=a.scaling / (1.0 - a.dropout))
        dx[part] = total
    return dx.reshape(dx_shape(a)), dA, dB


def as_rows(tensor: Tensor) -> Tensor:
    """All dimensions but the last as one."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # -1 could be any number where the last is 0


def dx_shape(a: LoraLinearBackward) -> tuple[int, ...]:
    return tuple(a.x.shape) if a.x is not None else (*a.dy.shape[:-1], 2 * a.qweight.shape[1])


def low_rank(a: LoraLinear, rows: Tensor) -> Tensor:
    """S = dropout(rows) A^T: [M, R] of the rows' dtype, R = 0 without LoRA. The rows are those of x."""
    if a.lora_A is None:
        return rows.new_empty(len(rows), 0)
    A = a.lora_A.to(rows.dtype)
    S = rows.new_empty(len(rows), len(A))
    for part in slices_of(rows, A):
        S[part] = _product(_dropped(rows, part, a.dropout, a.seed), A.T).mul_(1.0 / (1.0 - a.dropout))
    return S


def low_rank_backward(a: LoraLinearBackward, grad: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """T = grad B of grad's dtype; dA and dB of the dtypes of lora_A and lora_B, empty without rows or without S.

    The rows are those of dy and of x. Without LoRA all three are empty.
    """
    none = grad.new_empty(0, dtype=torch.float32)
    if a.lora_A is None or a.lora_B is None:
        return none, none, none
    B = a.lora_B.to(grad.dtype)
    T = grad.new_empty(len(grad), B.shape[1])
    dA = none if rows is None else torch.zeros_like(a.lora_A, dtype=torch.float32)
    dB = none if a.S is None else torch.zeros_like(a.lora_B, dtype=torch.float32)
    for part in slices_of(grad, a.lora_A.T):
        T[part] = _product(grad[part], B)
        if rows is not None:
            scale = a.scaling / (1.0 - a.dropout)
            dA.add_(_product(T[part].T, _dropped(rows, part, a.dropout, a.seed)), alpha=scale)
        if a.S is not None:
            dB.add_(_product(grad[part].T, a.S[part]), alpha=a.scaling)
    return T, dA if rows is None else dA.to(a.lora_A.dtype), dB if a.S is None else dB.to(a.lora_B.dtype)


def _weight(packed: Packed, dtype: torch.dtype) -> Tensor:
    absmax = packed.absmax if packed.nested is None else _ops.absmax_dequantize(packed.absmax, packed.nested)
    return _ops.nf4_dequantize(packed.qweight, absmax, packed.blocksize, dtype)


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
    for _ in range(_C.PHILOX_ROUNDS):
        first, second = c0 * _C.PHILOX_MULTIPLIER[0], c2 * _C.PHILOX_MULTIPLIER[1]
        c0, c1, c2, c3 = second >> 32 & _WORD ^ c1 ^ k0, second & _WORD, first >> 32 & _WORD ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _C.PHILOX_WEYL[0]) & _WORD, (k1 + _C.PHILOX_WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=1).flatten()
