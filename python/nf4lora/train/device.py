"""Device and dtype of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nf4lora.train.errors import UsageError

if TYPE_CHECKING:
    import torch


def choose_device(wanted: str) -> tuple[str, str]:
    """-> 'cuda' or 'cpu', and why not CUDA where it was left to us.

    'cuda' is the chosen card from here on: the others are hidden from this process, or, where CUDA has started already,
    it is made the current one. Call this before anything starts CUDA.

    Raises:
        UsageError: CUDA was asked for and cannot be had.
    """
    import torch

    if wanted == "cpu":
        return "cpu", ""
    index = int(wanted.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_initialized():
        # The driver reads this once, when it is first asked for anything: before we know how many cards there are.
        names = [str(index)] if visible is None else [name for name in visible.split(",") if name][index : index + 1]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    missing = _why_no_cuda()
    if missing:
        _set_visible(visible)
        if index and missing == NO_DEVICE:
            missing = f"there is no such card among {'those of this machine' if visible is None else visible}"
        if wanted != "auto":
            raise UsageError(f"device {wanted}: {missing}")
        return "cpu", missing
    if torch.cuda.device_count() > 1:  # the driver had been asked before, and hides nothing any more
        _set_visible(visible)
        if index >= torch.cuda.device_count():
            raise UsageError(f"device {wanted}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
        torch.cuda.set_device(index)
    return "cuda", ""


NO_DEVICE = "torch sees no CUDA device"


def _set_visible(value: str | None) -> None:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if value is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = value


def _why_no_cuda() -> str:
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
