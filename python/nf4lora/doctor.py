"""What this installation is and what it found: `build_info()` for programs, `nf4lora doctor` for people."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from nf4lora import _C

# What needs it, and the line that brings it.
PACKAGES = {
    "transformers": ("models", "pip install -U 'transformers>=5.17'"),
    "peft": ("adapters", "pip install -U peft"),
    "trl": ("nf4lora train", "pip install 'nf4lora[train]'"),
    "datasets": ("nf4lora train", "pip install 'nf4lora[train]'"),
    "rich": ("nf4lora train", "pip install 'nf4lora[train]'"),
    "matplotlib": ("nf4lora train", "pip install 'nf4lora[train]'"),
}


def build_info() -> dict[str, Any]:
    """What was built and what runs: a dict of plain values, safe to log.

    Keys: version, format_version, torch, built_with_torch, python, compiler, cpu (instruction set in use),
    cpu_available (those this processor has), threads, cuda_built (toolkit version or None), cuda_archs, cuda_torch
    (torch's CUDA or None), cuda_devices (name and compute capability of each). Starts no CUDA context.

    >>> sorted(build_info())[:3]
    ['built_with_torch', 'compiler', 'cpu']
    """
    devices = []
    if torch.version.cuda and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"})
    return {
        "version": _C.__version__,
        "format_version": _C.FORMAT_VERSION,
        "torch": torch.__version__,
        "built_with_torch": _C.BUILD_TORCH,
        "python": platform.python_version(),
        "compiler": _C.COMPILER,
        "cpu": _C.cpu_instruction_set(),
        "cpu_available": _C.cpu_instruction_sets(),
        "threads": torch.get_num_threads(),
        "cuda_built": _C.CUDA_VERSION or None,
        "cuda_archs": _C.CUDA_ARCHS or None,
        "cuda_torch": torch.version.cuda,
        "cuda_devices": devices,
    }


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report. `cure` is a command or a sentence; `broken` decides the exit code."""

    what: str
    cure: str = ""
    broken: bool = False


def findings(info: dict[str, Any]) -> Iterator[Finding]:
    """What build_info() says, in words, with one line of cure for each problem."""
    yield Finding(f"nf4lora {info['version']} (checkpoint format {info['format_version']}), Python {info['python']}")
    yield Finding(f"torch {info['torch']}; built against {info['built_with_torch']} with {info['compiler']}")
    yield from _cpu(info)
    yield from _cuda(info)
    for name, (need, cure) in PACKAGES.items():
        try:
            yield Finding(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield Finding(f"{name} is missing; {need} needs it", cure, broken=name in ("transformers", "peft"))
    yield from _peft()


def _peft() -> Iterator[Finding]:
    """A new transformers may want a PEFT that its other users have not yet got."""
    from packaging.version import Version
    from transformers.integrations import peft as own

    with contextlib.suppress(metadata.PackageNotFoundError):
        found, wanted = metadata.version("peft"), getattr(own, "MIN_PEFT_VERSION", "0")
        if Version(found) < Version(wanted):
            yield Finding(
                f"transformers' own add_adapter and load_adapter refuse peft {found}; prepare and PEFT itself work",
                f"pip install 'peft>={wanted}', or an older transformers",
            )


def _cpu(info: dict[str, Any]) -> Iterator[Finding]:
    best = info["cpu_available"][-1]
    forced = "" if info["cpu"] == best else f"; NF4LORA_CPU holds it below {best}"
    yield Finding(
        f"CPU kernels: {info['cpu']}{forced} (this processor has {', '.join(info['cpu_available'])}), "
        f"{info['threads']} threads",
        "unset NF4LORA_CPU" if forced else "",
    )
    if best == "scalar":
        yield Finding("the processor has no AVX2: the CPU path is right but slow", "train on a newer CPU or a GPU")


def _cuda(info: dict[str, Any]) -> Iterator[Finding]:
    built, devices = info["cuda_built"], info["cuda_devices"]
    if built:
        yield Finding(f"CUDA kernels: built with CUDA {built} for {info['cuda_archs'].replace(';', ' ')}")
    else:
        yield Finding("CUDA kernels: not built, no nvcc was found; the CPU path works")
    if not info["cuda_torch"]:
        yield Finding(
            "GPU: none used, this torch is a CPU build",
            "on a machine with an NVIDIA GPU: pip install --force-reinstall torch, then reinstall nf4lora",
        )
    elif not devices:
        yield Finding(
            f"GPU: none found, torch is built for CUDA {info['cuda_torch']} but sees no device",
            "if there is one: check that nvidia-smi answers, and that CUDA_VISIBLE_DEVICES is not empty",
        )
    for device in devices:
        name = f"GPU: {device['name']}, compute capability {device['capability']}"
        if not built:
            cure = "install the CUDA toolkit, then: pip install --force-reinstall --no-deps --no-cache-dir nf4lora"
            yield Finding(f"{name}, not used: nf4lora was built without CUDA", cure, broken=True)
        elif float(device["capability"]) < 8.0:
            yield Finding(f"{name}, not used: kernels need 8.0 (Ampere) or later", "run on the CPU", broken=True)
        else:
            yield Finding(name)


def main() -> int:
    """Print the findings; 1 if something that is there cannot be used."""
    broken = False
    for finding in findings(build_info()):
        broken |= finding.broken
        print(("! " if finding.broken else "- ") + finding.what)
        if finding.cure:
            print("    cure: " + finding.cure)
    return int(broken)
