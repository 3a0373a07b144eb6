"""Numbers that a device computes, on their way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """Scalars of one device, copied to the host behind the work that is queued there; nobody waits until `values`.

    Args:
        scalars: tensors of one element each, on one device
    """

    def __init__(self, scalars: list[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, scalar in enumerate(scalars):
            by_dtype.setdefault(scalar.dtype, []).append(i)
        # One launch for all scalars of a dtype, where a cast for each would be a launch each.
        parts = [torch.stack([scalars[i].detach().reshape(()) for i in group]) for group in by_dtype.values()]
        packed = torch.cat([part.double() for part in parts])
        self._order = [i for group in by_dtype.values() for i in group]
        self._copy = packed.to("cpu", non_blocking=True)  # into pinned memory, if the device is a GPU
        self._copied: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(packed.device))

    def has_arrived(self) -> bool:
        """Whether `values` would not wait; always so on a CPU."""
        return self._copied is None or self._copied.query()

    def values(self) -> list[float]:
        """The numbers in the order of the scalars; waits for the device until they have been computed."""
        if self._copied is not None:
            self._copied.synchronize()
        values = [0.0] * len(self._order)
        for i, value in zip(self._order, self._copy.tolist(), strict=True):
            values[i] = value
        return values


def read(scalars: list[Tensor]) -> list[float]:
    """The values of tensors of one element on one device, with one wait."""
    return Reading(scalars).values() if scalars else []
