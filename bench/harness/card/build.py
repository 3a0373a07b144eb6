"""Compiles the card, and the CUDA ops of this repository against it; both are kept in build/."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

from ..nvcc import CSRC, FLAGS, Kept, compile_objects, find_nvcc, run

HERE = Path(__file__).parent
RULES = HERE / "operators.cpp"
RUNTIME = sorted({*HERE.glob("*.cpp")} - {RULES})
CARD = Kept("card", *RUNTIME, *sorted(HERE.glob("*.h")))
OPERATORS = Kept("operators", CSRC, RULES)
LIMIT = "NF4LORA_CARD_BYTES"  # memory.cpp reads it
TOOLKIT = "13"  # the CUDA whose functions the card has
# Of the runtime, the driver and cuBLAS: nvcc's own entry points begin with __cuda.
THEIRS = re.compile(r"(__)?cu(da|blas(Lt)?)?[A-Z]\w*")


@functools.cache
def reason() -> str | None:
    """Why the card cannot be used here; None where it can."""
    import torch

    needs = "the card that computes nothing needs"
    if torch.version.cuda is None or torch.version.cuda.split(".")[0] != TOOLKIT:
        return f"{needs} torch built for CUDA {TOOLKIT}, got one for {torch.version.cuda or 'CPUs'}"
    if not CSRC.is_dir():
        return f"{needs} the repository, where it is compiled"
    if find_nvcc() is None:
        return f"{needs} nvcc on PATH"
    if shutil.which("c++") is None:
        return f"{needs} a C++ compiler"
    if not _toolkit().is_dir():
        return f"{needs} CUDA's libraries as pip installs them with torch, got none in {_toolkit()}"
    if torch.cuda.is_available():
        return f"{needs} a machine without a GPU"
    return None


def environment(limit: int | None = None) -> dict[str, str]:
    """The variables of a process that shall see the card; `limit`: bytes of its memory, else those of an H200."""
    before = os.environ.get("LD_PRELOAD")
    variables = {"LD_PRELOAD": f"{runtime()}:{before}" if before else str(runtime())}
    if limit is not None:
        variables[LIMIT] = str(limit)
    return variables


def runtime() -> Path:
    """The library that stands in for CUDA."""
    toolkit, torch_folder = _toolkit(), _torch()
    include = ["-I", str(toolkit / "include")]  # cuBLAS: it comes with torch, not with nvcc
    objects = compile_objects(RUNTIME, CARD, "-Xcompiler", "-Wall,-Wextra,-Werror", *include)

    def make(library: Path) -> None:
        exported = {
            name
            for path in ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")
            for name in _symbols(toolkit / "lib" / path, "--dynamic", "--defined-only")
        }
        wanted = _symbols(torch_folder / "lib/libcaffe2_nvrtc.so", "--dynamic", "--undefined-only")  # of the driver
        present = {name for path in objects for name in _symbols(path, "--defined-only")}
        absent = sorted(name for name in (exported | wanted) - present if THEIRS.fullmatch(name))
        source = library.with_suffix(".c")
        lines = [f'void {name}(void) {{ nf4lora_card_absent("{name}"); }}' for name in absent]
        source.write_text("\n".join(["void nf4lora_card_absent(const char*);", *lines]) + "\n")
        stubs = str(library.with_suffix(".o"))
        run(["c++", "-x", "c", "-w", "-fno-builtin", "-fPIC", "-c", str(source), "-o", stubs])
        # torch loads the driver by this name where it first uses a device, and takes what has it already.
        name = "-Wl,-soname,libcuda.so.1"
        run(["c++", "-shared", name, "-o", str(library), *map(str, objects), stubs])

    return CARD.file(["runtime", str(toolkit), str(torch_folder), *map(str, objects)], make, ".so")


def operators() -> Path:
    """The CUDA ops of csrc/cuda, whose launches go to the card."""
    import torch

    torch_folder = _torch()
    sources = [path for path in sorted((CSRC / "cuda").glob("*.cpp")) if not path.stem.startswith(("absent", "paged"))]
    flags = [
        "-DNDEBUG",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",  # as CMakeLists.txt has it
        *("-isystem", str(torch_folder / "include"), "-isystem", sysconfig.get_path("include"), "-I", str(CSRC)),
        *("-Xcompiler", "-fvisibility=hidden,-ffp-contract=off"),
    ]
    version = f"-DTORCH_OF_THE_CARD={torch.__version__}"  # in the key alone: its headers are no source of ours
    objects = compile_objects([*sources, RULES], OPERATORS, *flags, version)
    kernels = compile_objects(sorted((CSRC / "cuda").glob("*.cu")))

    def make(library: Path) -> None:
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ldl"]
        run(["c++", "-shared", "-o", str(library), *map(str, [*objects, *kernels]), *libraries])

    return OPERATORS.file(["operators", *FLAGS, *map(str, [*objects, *kernels])], make, ".so")


def _symbols(path: Path, *options: str) -> set[str]:
    """Names in a library or an object, without their versions."""
    lines = run(["nm", *options, str(path)]).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line}


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _toolkit() -> Path:
    return _torch().parent / f"nvidia/cu{TOOLKIT}"
