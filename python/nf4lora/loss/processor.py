"""Matrix products for the loss that are fast on this machine's processor.

An x86 processor without AVX512-BF16 has no instruction for products of bfloat16 matrices, and torch computes them
element by element: x W^T takes twice the time of float32, and p W, which the gradient of a loss needs, a hundred times.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from nf4lora import _C  # type: ignore[attr-defined]

COLUMNS = 4096  # rows of W that are converted to float32 at a time, so that their copy fits into a cache


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has fast products of matrices of this dtype on the CPU."""
    if dtype is torch.float32 or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return dtype is torch.bfloat16 and "avx512bf16" in _C.cpu_instruction_sets()


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the dtype of x, summed in float32 on every processor: [M, K], [N, K] -> [M, N]."""
    if x.device.type != "cpu" or multiplies(x.dtype):
        return x @ weight.T
    product, x = x.new_empty(len(x), len(weight)), x.float()
    for start in range(0, len(weight), COLUMNS):
        part = slice(start, start + COLUMNS)
        product[:, part] = x @ weight[part].float().T
    return product


def times(p: Tensor, weight: Tensor) -> Tensor:
    """p W in the weight's dtype, summed in float32 on every processor: [M, N] in any float dtype, [N, K] -> [M, K]."""
    if p.device.type != "cpu" or multiplies(weight.dtype):
        return p.to(weight.dtype) @ weight
    total = p.new_zeros(len(p), weight.shape[1], dtype=torch.float32)
    for start in range(0, len(weight), COLUMNS):
        part = slice(start, start + COLUMNS)
        total.addmm_(p[:, part].to(weight.dtype).float(), weight[part].float())
    return total.to(weight.dtype)
