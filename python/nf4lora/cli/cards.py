"""The card that a process of the command line uses: the others are hidden from it."""

from __future__ import annotations

import os

from nf4lora.train.device import NO_DEVICE, Device, choose_device, why_no_cuda
from nf4lora.train.errors import UsageError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def choose_card(wanted: str) -> Device:
    """The device that an option means, as the only one that this process sees, or, where CUDA has started already, as
    the current one. Call this before anything starts CUDA.

    A library that asks for card 0 by itself would otherwise take half a gigabyte on a card that others use.

    Raises:
        UsageError: CUDA was asked for and cannot be had.
    """
    import torch

    visible, index = os.environ.get(VISIBLE), int(wanted.partition(":")[2] or 0)
    if wanted != "cpu" and not torch.cuda.is_initialized():
        # The driver reads this once, when it is first asked for anything: before we know how many cards there are.
        names = [str(index)] if visible is None else [name for name in visible.split(",") if name][index : index + 1]
        os.environ[VISIBLE] = ",".join(names)
        missing = why_no_cuda()
        if not missing and torch.cuda.device_count() == 1:
            return Device("cuda")
        _set_visible(visible)
        if index and missing == NO_DEVICE:
            cards = "those of this machine" if visible is None else visible
            raise UsageError(f"device {wanted}: there is no such card among {cards}")
    device = choose_device(wanted)  # the driver had been asked before, so that the variable hides nothing any more
    if device.kind == "cuda":
        torch.cuda.set_device(device.index)
    return device


def _set_visible(value: str | None) -> None:
    os.environ.pop(VISIBLE, None)
    if value is not None:
        os.environ[VISIBLE] = value
