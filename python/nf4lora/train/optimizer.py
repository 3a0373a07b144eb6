"""Which optimizer a run takes, under the names that people know."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.settings import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor


def choose(config: TrainConfig, device: str) -> str:
    """The optimizer of this device, where the options leave it open.

    Raises:
        UsageError: page_to is for state on the CPU, in a folder that is there.
    """
    if config.page_to is not None:
        if device != "cpu":
            raise UsageError(f"page_to {config.page_to} is for the CPU; on CUDA the state moves to the host by itself")
        if not os.path.isdir(config.page_to):
            raise UsageError(f"page_to: {config.page_to} is not a folder")
    if config.optim != "auto":
        return config.optim
    if device == "cpu":
        return "adamw" if config.page_to is None else "paged_adamw_32bit"
    return "paged_adamw_8bit"


def keywords(config: TrainConfig) -> dict[str, Any]:
    """What Trainer is given: nothing where its own AdamW is meant, which `arguments` names."""
    from nf4lora.optim.paged_adamw import PagedAdamW

    if config.optim == "adamw":
        return {}
    bits = 8 if config.optim == "paged_adamw_8bit" else 32
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "bits": bits, "page_to": config.page_to}
    return {"optimizer_cls_and_kwargs": (PagedAdamW, options)}


def unwrapped(used: Any) -> Any:
    """The optimizer under accelerate's wrapper."""
    return getattr(used, "optimizer", used)


def state_report(used: Any) -> list[str]:
    """What a paged optimizer says of its memory at the end."""
    from nf4lora.optim.paged_adamw import PagedAdamW

    used = unwrapped(used)
    return used.report().splitlines() if isinstance(used, PagedAdamW) else []


def can_leave_out(used: Any) -> bool:
    """Whether the optimizer leaves out a step by itself where its `found_inf` says so: PagedAdamW, and torch's AdamW in
    its fused form."""
    import torch

    from nf4lora.optim.paged_adamw import PagedAdamW

    fused = isinstance(used, torch.optim.AdamW) and all(group.get("fused") for group in used.param_groups)
    return fused or isinstance(used, PagedAdamW)


def leave_out(used: Any, bad: Tensor | None) -> None:
    """Have the next step change nothing if `bad` ([] float32, on the device) is 1; None: it is to be taken."""
    if can_leave_out(used):
        used.found_inf = bad


def uncount(used: Any) -> None:
    """Take back the count of a step that was left out; torch's AdamW has not counted it."""
    from nf4lora.optim.paged_adamw import PagedAdamW

    if isinstance(used, PagedAdamW):
        used.uncount_step()


def check_state(config: TrainConfig, checkpoint: Path) -> None:
    """Refuse to give torch's AdamW moments in 8 bits, which it would take for numbers.

    Raises:
        RunError: the checkpoint holds such.
    """
    import torch

    if config.optim != "adamw":
        return
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
    if any(tensor.dtype is torch.uint8 for state in saved["state"].values() for tensor in state.values()):
        raise RunError(
            f"optim adamw cannot go on from {checkpoint}, whose optimizer has 8-bit moments; use paged_adamw_8bit, or "
            "paged_adamw_32bit, which converts them"
        )
