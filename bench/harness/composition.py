"""A rival written for this bench: LoRA over NF4 as a composition of torch's products, with its backward by hand.

Fine-tuners that are quick without kernels of their own for the product do it so, Unsloth among them: the weight is
unpacked whole into one buffer for all layers, torch multiplies, and the low-rank term is added to the result by addmm.
The backward unpacks again, so that nothing but x is kept; T = dy B is computed once. Unpacking is nf4lora's own, in two
launches, scales first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import ops

Packed = tuple[Tensor, Tensor, Tensor]  # codes, scales in 8 bits, their scales

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Composition(nn.Module):
    """y = x W^T + scaling * (x A^T) B^T, everything in x's dtype.

    Args:
        weight: [N, K] bfloat16 or float16, packed in NF4 with double quantisation
        lora_A: [R, K] float32;  lora_B: [N, R] float32
    """

    def __init__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        codes, scales = ops.nf4_quantize(weight)
        self.packed: Packed = (codes, *ops.absmax_quantize(scales))
        self.lora_A, self.lora_B, self.scaling = nn.Parameter(lora_A), nn.Parameter(lora_B), scaling

    def forward(self, x: Tensor) -> Tensor:
        return _Composed.apply(x, self.packed, self.lora_A, self.lora_B, self.scaling)


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, packed: Packed, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        context.save_for_backward(x, A, B)
        context.packed, context.scaling, context.dtypes = packed, scaling, (lora_A.dtype, lora_B.dtype)
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ unpacked(packed, x.dtype).T
        y.addmm_(rows @ A.T, B.T, alpha=scaling)
        return y.view(*x.shape[:-1], len(B))

    @staticmethod
    def backward(context: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:  # type: ignore[override]
        x, A, B = context.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        T = grad @ B
        dA = torch.empty_like(A).addmm_(T.T, rows, beta=0, alpha=context.scaling)
        dB = torch.empty_like(B).addmm_(grad.T, rows @ A.T, beta=0, alpha=context.scaling)
        dx = grad @ unpacked(context.packed, dy.dtype)
        dx.addmm_(T, A, alpha=context.scaling)
        return dx.view(x.shape), None, dA.to(context.dtypes[0]), dB.to(context.dtypes[1]), None


def unpacked(packed: Packed, dtype: torch.dtype) -> Tensor:
    """W whole, in a buffer that holds until the next call."""
    codes, scales, nested = packed
    N, half = codes.shape
    key = codes.device, dtype
    if key not in _buffers or _buffers[key].numel() < 2 * codes.numel():
        _buffers.pop(key, None)  # freed before the larger one is allocated
        _buffers[key] = torch.empty(2 * codes.numel(), dtype=dtype, device=codes.device)
    out = _buffers[key][: 2 * codes.numel()].view(N, 2 * half)
    return ops.nf4_dequantize(codes, ops.absmax_dequantize(scales, nested), out=out)


def forget_buffers() -> None:
    """Free the buffers."""
    _buffers.clear()
