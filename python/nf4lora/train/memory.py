"""Peak memory of this process, and of the device."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_bytes(device: str) -> int:
    """Most bytes held so far: of torch's allocator on CUDA, else of the whole process (resident)."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:  # VmHWM starts afresh with the program; ru_maxrss may be that of the shell that started it
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def total_bytes(device: str) -> int | None:
    """Memory of the CUDA device; None on a CPU, where other programs share it."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return None
