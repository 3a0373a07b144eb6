"""The answers that contenders are checked against on any device: products in float32 over a dequantised weight.

They keep the contract of the ops: A, B, S and T are rounded to x's dtype, sums are float32. The reference in plain
torch (`nf4lora.ops.reference`) says the same, but is for small tensors; these run where the contenders run.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, W: Tensor, A: Tensor | None, B: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """y = x W^T + scaling * S B^T and S = x A^T.

    Args:
        x: [M, K];  W: [N, K], of x's dtype;  A: [R, K];  B: [N, R]; None without LoRA

    Returns:
        y: [M, N] float32
        S: [M, R] of x's dtype; R = 0 without LoRA
    """
    y = x.float() @ W.float().T
    if A is None or B is None:
        return y, x[:, :0]
    S = low_rank(x, A)
    return y.addmm_(S.float(), _rounded(B, x).T, alpha=scaling), S


def backward(
    dy: Tensor, x: Tensor, W: Tensor, A: Tensor | None, B: Tensor | None, scaling: float
) -> tuple[Tensor, ...]:
    """dx, and with LoRA dA and dB: [M, K], [R, K] and [N, R] float32."""
    dx = dy.float() @ W.float()
    if A is None or B is None:
        return (dx,)
    S, T = low_rank(x, A).float(), (dy.float() @ _rounded(B, dy)).to(dy.dtype).float()
    dx.addmm_(T, _rounded(A, dy), alpha=scaling)
    return dx, scaling * (T.T @ x.float()), scaling * (dy.float().T @ S)


def low_rank(x: Tensor, A: Tensor) -> Tensor:
    """S: [M, R] of x's dtype."""
    return (x.float() @ _rounded(A, x).T).to(x.dtype)


def _rounded(matrix: Tensor, like: Tensor) -> Tensor:
    return matrix.to(like.dtype).to(torch.float32)
