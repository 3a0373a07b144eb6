"""nvcc as the tests use it. What it makes of the sources is kept in build/ptx until a source, a flag or nvcc changes:
compiling takes minutes, and a second run of the tests, on another torch say, needs the same files."""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[3]
CSRC = ROOT / "csrc"
ARCHITECTURES = re.findall(r"(\w+)-real", (ROOT / "CMakeLists.txt").read_text())
FLAGS = ["-std=c++20", "-O3"]  # as CMakeLists.txt has them
NVCC = "nvcc"
KEPT = ROOT / "build" / "ptx"


def find_nvcc() -> str | None:
    return shutil.which(NVCC)


@functools.cache
def compile_ptx(source: Path, architecture: str, *flags: str) -> str:
    """The PTX of a source, for compute_<architecture>."""
    command = [NVCC, *FLAGS, *flags, f"-arch=compute_{architecture}", "-ptx", str(source)]
    return kept(command, lambda path: run([*command, "-o", str(path)])).read_text()


def compile_library(sources: list[Path], *options: str) -> Path:
    """A shared library of CUDA sources, which are compiled side by side."""

    def make(library: Path) -> None:
        def compile_one(source: Path) -> str:
            target = f"{library}.{source.stem}.o"
            run([NVCC, *FLAGS, "-arch=compute_80", "-Xcompiler", "-fPIC", "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as several:
            objects = list(several.map(compile_one, sources))
        run([NVCC, "-arch=compute_80", "-shared", *options, "-o", str(library), *objects])

    return kept([*FLAGS, *options, *map(str, sources)], make)


def kept(key: list[str], make: Callable[[Path], None]) -> Path:
    """The file that `make` writes, unless an earlier run has made it of the same key, sources and nvcc."""
    folder = _folder()
    path = folder / hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process beside this one waits for the file, and does not make it too
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / "made"
                make(made)
                os.replace(made, path)  # all of it or nothing
    return path


@functools.cache
def _folder() -> Path:
    """Where files made of the present sources are kept; those of earlier ones are removed."""
    digest = hashlib.sha256(subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout)
    for source in sorted([*CSRC.rglob("*"), *Path(__file__).parent.glob("*.c*")]):
        if source.is_file():
            digest.update(str(source).encode() + b"\0" + source.read_bytes() + b"\0")
    folder = KEPT / digest.hexdigest()[:16]
    KEPT.mkdir(parents=True, exist_ok=True)
    for stale in KEPT.iterdir():
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    return folder


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
