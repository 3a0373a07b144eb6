"""Device and dtype of a run."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nf4lora.train.errors import UsageError

if TYPE_CHECKING:
    import torch

NO_DEVICE = "torch sees no CUDA device"


@dataclass(frozen=True)
class Device:
    """Where a run computes."""

    kind: str  # cpu or cuda
    index: int = 0  # of the card, among those that torch sees
    why: str = ""  # why not on CUDA, where the choice was left to us

    def current(self) -> AbstractContextManager:
        """Within, the card is torch's current one, so that `cuda` means this card to all libraries."""
        import torch

        return torch.cuda.device(self.index) if self.kind == "cuda" else nullcontext()


def choose_device(wanted: str) -> Device:
    """The device that an option (auto, cpu, cuda, cuda:1) means. Nothing in the process is changed.

    Raises:
        UsageError: CUDA was asked for and cannot be had.
    """
    import torch

    if wanted == "cpu":
        return Device("cpu")
    index = int(wanted.partition(":")[2] or 0)
    if missing := why_no_cuda():
        if wanted != "auto":
            raise UsageError(f"device {wanted}: {missing}")
        return Device("cpu", why=missing)
    if index >= torch.cuda.device_count():
        raise UsageError(f"device {wanted}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return Device("cuda", index)


def why_no_cuda() -> str:
    """Why CUDA cannot be used here; nothing where it can."""
    import torch

    from nf4lora import _C  # type: ignore[attr-defined]

    if not torch.version.cuda:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return NO_DEVICE
    return "" if _C.CUDA_VERSION else "nf4lora was built without CUDA kernels"


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it, else float32."""
    import torch

    from nf4lora.loss.processor import multiplies

    if wanted != "auto":
        return getattr(torch, wanted)
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = multiplies(torch.bfloat16)
    return torch.bfloat16 if fast else torch.float32


def check_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("nf4lora train runs in one process for now; start it without torchrun or accelerate launch")
