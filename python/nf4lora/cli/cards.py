"""Chooses the card of a command-line process, and hides the other cards from it."""

from __future__ import annotations

import os

from nf4lora.train.device import NO_DEVICE, Device, choose_device, why_no_cuda
from nf4lora.train.errors import UsageError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def choose_card(wanted: str) -> Device:
    """The device that an option names. It becomes the only card that this process sees or, if CUDA has started already,
    the current one. Call this before anything starts CUDA.

    If the other cards were visible, a library that uses card 0 would take half a gigabyte on a card that others use.

    Raises:
        UsageError: the option asks for CUDA, which is not available.
    """
    import torch

    visible, index = os.environ.get(VISIBLE), int(wanted.partition(":")[2] or 0)
    if wanted != "cpu" and not torch.cuda.is_initialized():
        # The driver reads this variable once, at its first call, which is before we know how many cards there are.
        names = [str(index)] if visible is None else [name for name in visible.split(",") if name][index : index + 1]
        os.environ[VISIBLE] = ",".join(names)
        missing = why_no_cuda()
        if not missing and torch.cuda.device_count() == 1:
            return Device("cuda")
        _set_visible(visible)
        if index and missing == NO_DEVICE:
            cards = "those of this machine" if visible is None else visible
            raise UsageError(f"device {wanted}: there is no such card among {cards}")
    device = choose_device(wanted)  # the driver was called before, so the variable has no effect
    if device.kind == "cuda":
        torch.cuda.set_device(device.index)
    return device


def _set_visible(value: str | None) -> None:
    os.environ.pop(VISIBLE, None)
    if value is not None:
        os.environ[VISIBLE] = value
