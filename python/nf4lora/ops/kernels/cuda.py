"""lora_linear and its backward for CUDA tensors: calls the kernel that dispatch.py chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nf4lora.ops.arguments import LoraLinear, LoraLinearBackward
from nf4lora.ops.kernels import dispatch, sliced, unfused


def lora_linear(*arguments: Any) -> tuple[Tensor, Tensor]:
    """y and S, of the arguments of LoraLinear."""
    a = LoraLinear(*arguments)
    match dispatch.chosen("forward", a.x, a.qweight):
        case "few":
            return torch.ops.nf4lora_cuda.lora_linear_few.default(*a)
        case "fused":
            return torch.ops.nf4lora_cuda.lora_linear_gemm.default(*a)
        case "sliced":
            return sliced.lora_linear(*a)
    return unfused.lora_linear(*a)


def lora_linear_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB, of the arguments of LoraLinearBackward."""
    a = LoraLinearBackward(*arguments)
    match dispatch.chosen("backward", a.dy, a.qweight):
        case "fused":
            return torch.ops.nf4lora_cuda.lora_linear_gemm_backward.default(*a)
        case "sliced":
            return sliced.lora_linear_backward(*a)
    return unfused.lora_linear_backward(*a)
