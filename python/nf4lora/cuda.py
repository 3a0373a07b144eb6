"""Which kernel computes lora_linear and its backward for a CUDA tensor.

few      up to 16 rows in 16 bits, forward: the packed weight is streamed once (csrc/cuda/lora_few.cu)
fused    16 bits: tensor cores, W unpacked on the way (csrc/cuda/lora_gemm.cu)
sliced   a slice of W at a time in 16 bits, multiplied by torch (sliced.py); takes everything
unfused  W whole, multiplied by torch (unfused.py): what the others are measured against

choice.json says which is the fastest (choice.py); where that one does not fit, it is sliced. `forced` is for measuring.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from nf4lora import choice, sliced, unfused

FEW_ROWS = 16  # kMostFewRows of csrc/cuda/launch.h
KERNELS = ("few", "fused", "sliced", "unfused")
forced: str | None = None  # one of KERNELS: to measure it where another would be chosen


def lora_linear(x: Tensor, qweight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """y and S; arguments and results as in ops.lora_linear."""
    match chosen("forward", x, qweight):
        case "few":
            return torch.ops.nf4lora_cuda.lora_linear_few.default(x, qweight, *arguments)
        case "fused":
            return torch.ops.nf4lora_cuda.lora_linear_gemm.default(x, qweight, *arguments)
        case "sliced":
            return sliced.lora_linear(x, qweight, *arguments)
    return unfused.lora_linear(x, qweight, *arguments)


def lora_linear_backward(
    dy: Tensor, x: Tensor | None, S: Tensor | None, qweight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB; arguments and results as in unfused.lora_linear_backward."""
    match chosen("backward", dy, qweight):
        case "fused":
            return torch.ops.nf4lora_cuda.lora_linear_gemm_backward.default(dy, x, S, qweight, *arguments)
        case "sliced":
            return sliced.lora_linear_backward(dy, x, S, qweight, *arguments)
    return unfused.lora_linear_backward(dy, x, S, qweight, *arguments)


def chosen(direction: str, rows: Tensor, qweight: Tensor) -> str:
    """The name of the kernel for rows of x, or backward of dy.

    Raises:
        ValueError: `forced` names one that cannot take these arguments.
    """
    if not rows.is_cuda or rows.dim() == 0 or qweight.dim() != 2:
        return "unfused"  # whose check says what is wrong; a CPU tensor comes here in tests alone
    tokens = math.prod(rows.shape[:-1])
    if tokens == 0 or qweight.shape[1] == 0:
        return "unfused"  # torch knows what a sum over nothing is
    out_features = qweight.shape[0]
    if forced is None:
        name = choice.kernel_for(_architecture(rows.device), direction, tokens, 2 * qweight.numel())
        return name if fits(name, direction, tokens, rows.dtype, out_features) else "sliced"
    able = [name for name in KERNELS if fits(name, direction, tokens, rows.dtype, out_features)]
    if forced not in able:
        raise ValueError(f"lora_linear: cuda.forced must be one of {', '.join(able)} here, got {forced!r}")
    return forced


@functools.cache
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def fits(name: str, direction: str, tokens: int, dtype: torch.dtype, out_features: int) -> bool:
    """Whether a kernel takes so many tokens of this dtype."""
    if name in ("sliced", "unfused"):
        return True
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if name == "few":
        return direction == "forward" and tokens <= FEW_ROWS
    return direction == "forward" or (out_features % 8 == 0 and out_features > 0)  # rows of dy are copied by 16 bytes
