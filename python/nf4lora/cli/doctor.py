"""`nf4lora doctor`: what is installed, what is missing, and the command that repairs each problem.

Users call the doctor when something does not work. So this file imports a package only when it checks that package, and
an import that fails becomes a finding.
"""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from nf4lora.compat.library import build_info, module_cure, requirement, torch_cure

# Package -> the part of nf4lora that needs it, and the command that installs it.
PACKAGES = {
    "transformers": ("models", f"pip install -U '{requirement('transformers')}'"),
    "peft": ("adapters", f"pip install -U '{requirement('peft')}'"),
    "trl": ("nf4lora train", "pip install 'nf4lora[train]'"),
    "datasets": ("nf4lora train", "pip install 'nf4lora[train]'"),
    "rich": ("nf4lora train", "pip install 'nf4lora[train]'"),
    "matplotlib": ("nf4lora train", "pip install 'nf4lora[train]'"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report. `cure` is a command or a sentence; `broken` decides the exit code."""

    what: str
    cure: str = ""
    broken: bool = False


def findings(info: dict[str, Any] | None = None) -> Iterator[Finding]:
    """The findings about this installation, with one line of cure for each problem.

    Args:
        info: what build_info() returned; None: it is called here, if torch and the compiled module can be imported
    """
    if (system := platform.system()) != "Linux":
        yield Finding(
            f"{system or 'this system'} is not supported: nf4lora is built and tested on Linux only",
            "on Windows use WSL 2, on macOS a Linux container or virtual machine",
            broken=True,
        )
    if info is None:
        yield from (broken := list(_broken_imports()))
        if broken:
            yield Finding(f"Python {platform.python_version()}")
        else:
            try:
                info = build_info()
            except ValueError as error:  # NF4LORA_CPU names no instruction set of this processor
                yield Finding(str(error), "unset NF4LORA_CPU", broken=True)
    if info is not None:
        yield Finding(
            f"nf4lora {info['version']} (checkpoint format {info['format_version']}), Python {info['python']}"
        )
        yield Finding(f"torch {info['torch']}; built against {info['built_with_torch']} with {info['compiler']}")
        yield from _cpu(info)
        yield from _cuda(info)
    for name, (need, cure) in PACKAGES.items():
        try:
            yield Finding(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield Finding(f"{name} is missing; {need} needs it", cure, broken=name in ("transformers", "peft"))
    with contextlib.suppress(Exception):  # `_library` reports a transformers that cannot be imported
        yield from _peft()
    yield from _library()


def _broken_imports() -> Iterator[Finding]:
    """torch or the compiled module, where it cannot be imported: build_info() needs both."""
    try:
        import torch
    except Exception as error:
        yield Finding(f"torch cannot be imported: {_one_line(error)}", torch_cure(), broken=True)
        return
    try:
        import_module("nf4lora._C")
    except Exception as error:
        yield Finding(
            f"the compiled module does not load with torch {torch.__version__}: {_one_line(error)}",
            module_cure(),
            broken=True,
        )


def _library() -> Iterator[Finding]:
    """Packages that are installed but cannot be imported."""
    for name in ("transformers", "peft"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        try:
            # `import transformers` loads little: modeling_utils is the part that nf4lora uses
            import_module("transformers.modeling_utils" if name == "transformers" else name)
        except Exception as error:
            cure = f"{PACKAGES[name][1]}; if that is the newest: pip install --force-reinstall {name}"
            yield Finding(f"{name} cannot be imported: {_one_line(error)}", cure, broken=True)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _peft() -> Iterator[Finding]:
    """A PEFT that is too old for transformers' own methods, as it may be where transformers is new."""
    from packaging.version import Version
    from transformers.integrations import peft as integration

    with contextlib.suppress(metadata.PackageNotFoundError):
        installed, wanted = metadata.version("peft"), getattr(integration, "MIN_PEFT_VERSION", "0")
        if Version(installed) < Version(wanted):
            yield Finding(
                f"transformers' own add_adapter and load_adapter refuse peft {installed}; prepare and PEFT itself work",
                f"pip install 'peft>={wanted}' once the package index has it, or an older transformers",
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
        yield Finding("CUDA kernels: not built (NF4LORA_CUDA=OFF, or no nvcc at build time); the CPU path works")
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
            continue
        major, minor = (int(part) for part in device["capability"].split("."))
        code = code_for(major, minor, info["cuda_archs"] or "")
        if major < 8:
            yield Finding(f"{name}, not used: kernels need 8.0 (Ampere) or later", "run on the CPU", broken=True)
        elif not code:
            yield Finding(
                f"{name}, not used: it runs none of the architectures that the kernels were built for, "
                f"{(info['cuda_archs'] or 'none').replace(';', ' ')}",
                f"NF4LORA_CUDA_ARCHS={major}{minor}-real "
                f"pip install --force-reinstall --no-deps --no-cache-dir nf4lora",
                broken=True,
            )
        elif code == "virtual":
            yield Finding(
                f"{name}: no machine code for it in the binary; the driver compiles the kernels at their first use, "
                f"which takes a while once",
                f"to have them compiled beforehand: NF4LORA_CUDA_ARCHS={major}{minor}-real "
                f"pip install --force-reinstall --no-deps --no-cache-dir nf4lora",
            )
        else:
            yield Finding(name)


def code_for(major: int, minor: int, archs: str) -> str:
    """How a card runs a binary built for these architectures: by its machine code ("real"), by PTX ("virtual"), or "".

    Machine code of `86` runs on every 8.x from 8.6 on, that of `90a` on 9.0 alone, that of `100f` on every 10.x from
    10.0 on; PTX of `80` on every card from 8.0 on. An entry without an end, such as `90`, holds both.

    >>> code_for(8, 9, "80-real"), code_for(9, 0, "80-real;80-virtual"), code_for(9, 0, "80-real")
    ('real', 'virtual', '')
    """
    fallback = ""
    for arch in re.split(r"[;,\s]+", archs):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", arch)
        if not match:
            continue
        its_major, its_minor, kind, code = int(match[1]), int(match[2]), match[3], match[4]
        exact = (its_major, its_minor) == (major, minor)
        family = its_major == major and its_minor <= minor
        if code != "virtual" and (exact if kind == "a" else family):
            return "real"
        if code != "real" and (exact if kind == "a" else family if kind else (its_major, its_minor) <= (major, minor)):
            fallback = "virtual"
    return fallback


def main() -> int:
    """Print the findings; returns 1 if something that is installed cannot be used, else 0."""
    broken = False
    for finding in findings():
        broken |= finding.broken
        print(("! " if finding.broken else "- ") + finding.what)
        if finding.cure:
            print("    cure: " + finding.cure)
    return int(broken)
