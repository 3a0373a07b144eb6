"""Which kernel computes lora_linear for a CUDA tensor.

A few rows in 16 bits stream the packed weight once (csrc/cuda/lora_few.cu). Everything else dequantises it and
multiplies with torch (unfused.py), until the fused kernels are there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nf4lora import unfused

FEW_ROWS = 16  # kMostFewRows of csrc/cuda/launch.h
forced: str | None = None  # "unfused": to measure it where another kernel would be chosen


def lora_linear(x: Tensor, qweight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """y and S; arguments and results as in ops.lora_linear."""
    if fits_few(x, qweight):
        return torch.ops.nf4lora_cuda.lora_linear_few.default(x, qweight, *arguments)
    return unfused.lora_linear(x, qweight, *arguments)


def fits_few(x: Tensor, qweight: Tensor) -> bool:
    """Whether the kernel for a few rows takes them; a copy that contiguous() makes is aligned."""
    return (
        forced != "unfused"
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.numel() <= FEW_ROWS * x.shape[-1]
        and all(not t.is_contiguous() or t.data_ptr() % 16 == 0 for t in (x, qweight))
    )
