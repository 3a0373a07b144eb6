"""What a figure depends on besides the code: device, versions, commit; and the machine's own speed, as yardsticks."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from nf4lora import build_info

from .timing import alternate, last_cache

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "kernels", "accelerate")
TOP = Path(__file__).resolve().parents[2]  # the folder that this package lies in: the repository, or nf4lora


def environment(device: str) -> dict:
    """Plain values that go with every result."""
    info = build_info()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info["cpu"],
        "cuda": info["cuda_torch"] if device == "cuda" else None,
        "last_cache_bytes": last_cache(device),
        "python": info["python"],
        "compiler": info["compiler"],
        "nf4lora": info["version"],
        **{name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The name that the processor gives itself."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else "unknown CPU"


def commit() -> str | None:
    """Of the sources that were measured; a trailing + says that they were changed since. None outside a repository."""

    def git(*words: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", str(TOP), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout.strip()

    if git("rev-parse", "--show-toplevel") != str(TOP):
        return None  # installed in a folder that happens to lie in somebody's repository
    changed = git("status", "--porcelain", "--", "csrc", "python", "CMakeLists.txt", "bench/*.py")
    return f"{git('rev-parse', '--short', 'HEAD')}{'+' if changed else ''}"


def file_name(machine: dict) -> str:
    """Of the results: device and, on a CPU, what decides its speed.

    >>> file_name({"device": "AMD EPYC", "cuda": None, "instruction_set": "avx512bf16", "threads": 2})
    'amd-epyc-avx512bf16-2-threads.json'
    """
    parts = [machine["device"]] + (
        [] if machine["cuda"] else [machine["instruction_set"], f"{machine['threads']} threads"]
    )
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-") + ".json"


def bandwidth(device: str, mebibytes: int = 256) -> dict[str, float]:
    """Bytes a second that torch itself reaches: reading (sum of int64), writing (fill_), and both (copy_)."""
    source = torch.ones(mebibytes << 17, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    took = alternate(
        {"read": source.sum, "write": lambda: target.fill_(1), "copy": lambda: target.copy_(source)},
        seconds=0.5,
        device=device,
    )
    size = source.nbytes
    return {name: (2 if name == "copy" else 1) * size / timing.median for name, timing in took.items()}


def peak_bandwidth(properties: object) -> float | None:
    """Bytes a second of a card's memory by its clock and the width of its bus; None where torch does not tell them.

    >>> from types import SimpleNamespace
    >>> peak_bandwidth(SimpleNamespace(memory_clock_rate=3_201_000, memory_bus_width=6144)) / 1e12  # kHz, bits: an H200
    4.916736
    """
    clock, width = (getattr(properties, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2 * clock * 1e3 * width / 8 if clock and width else None
