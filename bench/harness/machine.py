"""What figures depend on besides the code: device, versions and commit; and the machine's own bandwidth."""

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
    """Device, versions and commit as plain values, which are stored with every result."""
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
    """The name of the processor."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else "unknown CPU"


def commit() -> str | None:
    """The commit of the measured sources, with a + at the end if they were changed since; None outside a repository."""

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
    """The name of a result file: the device and, on a CPU, the instruction set and the number of threads.

    >>> file_name({"device": "AMD EPYC", "cuda": None, "instruction_set": "avx512bf16", "threads": 2})
    'amd-epyc-avx512bf16-2-threads.json'
    """
    parts = [machine["device"]]
    if not machine["cuda"]:
        parts += [machine["instruction_set"], f"{machine['threads']} threads"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-") + ".json"


def bandwidth(device: str, mebibytes: int = 256) -> dict[str, float]:
    """Bytes a second that torch reaches when it reads (sum of int64), writes (fill_), and does both (copy_)."""
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
    """Bytes a second of a card's memory, from its clock and the width of its bus; None if torch does not know them.

    >>> from types import SimpleNamespace
    >>> peak_bandwidth(SimpleNamespace(memory_clock_rate=3_201_000, memory_bus_width=6144)) / 1e12  # kHz, bits: an H200
    4.916736
    """
    clock, width = (getattr(properties, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2 * clock * 1e3 * width / 8 if clock and width else None
