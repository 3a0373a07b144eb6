"""Loading the library: torch, the compiled module and the packages that it needs; and how it was built."""

from __future__ import annotations

import platform
import re
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = Path(__file__).parents[3] / "pyproject.toml"  # of a source tree on PYTHONPATH, which is not installed


def version() -> str:
    """The installed version, read from the package's metadata, because loading the library takes seconds."""
    try:
        return metadata.version("nf4lora")
    except metadata.PackageNotFoundError:
        match = re.search(r'^version = "(.+)"', PROJECT.read_text(), re.MULTILINE) if PROJECT.is_file() else None
        return f"{match[1]} (source tree)" if match else "of unknown version: it is not installed"


def requirement(package: str) -> str:
    """The requirement of a package in pyproject.toml, such as `torch>=2.11`; its name alone where there is none."""
    try:
        asked = metadata.requires("nf4lora") or []
    except metadata.PackageNotFoundError:
        asked = re.findall(r'"([^"\n]+)"', PROJECT.read_text()) if PROJECT.is_file() else []
    requirements = (line.partition(";")[0].strip() for line in asked if re.match(r"[\w.-]*", line)[0] == package)  # type: ignore[index]
    return next(requirements, package)


def torch_cure() -> str:
    """The command that installs a torch that works with nf4lora."""
    return f"pip install '{requirement('torch')}'"


def module_cure() -> str:
    """What to do about a compiled module that does not load."""
    lowest = requirement("torch").partition(">=")[2].partition(",")[0]
    return (
        f"it needs torch{f' {lowest} or later' if lowest else ''} and this Python; rebuild it where it runs: "
        "pip install --force-reinstall --no-deps nf4lora"
    )


def doctor_cure() -> str:
    """What to do about a package that cannot be imported."""
    return "`nf4lora doctor` says which, and what brings it"


def load(*names: str) -> list[ModuleType]:
    """Import modules of this package, torch first.

    Raises:
        ImportError: torch, the compiled module, or a package that they need, cannot be imported. The text names a cure.
    """
    what, cure = "torch cannot be imported", torch_cure
    try:
        import torch

        what = f"the compiled module did not load with torch {torch.__version__}"
        cure = module_cure
        import_module("nf4lora._C")
        what, cure = "a package that it needs cannot be imported", doctor_cure
        return [import_module(f"nf4lora.{name}") for name in names]
    except Exception as error:  # a broken installation raises anything, OSError and RuntimeError included
        raise ImportError(f"nf4lora: {what}: {error}; {cure()}") from error


def build_info() -> dict[str, Any]:
    """How nf4lora was built, and what it runs on: a dict of plain values, safe to log.

    Keys: version, format_version, torch, built_with_torch, python, compiler, cpu (instruction set in use),
    cpu_available (those this processor has), threads, cuda_built (toolkit version or None), cuda_archs, cuda_torch
    (torch's CUDA or None), cuda_devices (name and compute capability of each). Starts no CUDA context.

    >>> sorted(build_info())[:3]
    ['built_with_torch', 'compiler', 'cpu']
    """
    import torch

    from nf4lora import _C

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
