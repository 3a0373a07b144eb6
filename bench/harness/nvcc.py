"""nvcc, and folders for what compilers make, of sources that change seldom.

Compiling takes minutes; a second run of the tests, on another torch say, needs the same files.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O3"]  # as CMakeLists.txt has them
NVCC = "nvcc"


def find_nvcc() -> str | None:
    return shutil.which(NVCC)


class Kept:
    """Files in build/<name>, which stay until one of the sources or nvcc changes.

    A source is a file, or a folder with all that lies in it.
    """

    def __init__(self, name: str, *sources: Path) -> None:
        self.parent = ROOT / "build" / name
        self.sources = sources

    def file(self, key: list[str], make: Callable[[Path], object], suffix: str = "") -> Path:
        """The file that `make` writes, unless an earlier run has made it of the same key, sources and nvcc."""
        path = self.folder / f"{hashlib.sha256(' '.join(key).encode()).hexdigest()[:16]}{suffix}"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a process beside this one waits for the file, and does not make it too
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                    made = Path(scratch) / f"made{suffix}"
                    make(made)
                    os.replace(made, path)  # all of it or nothing
        return path

    @functools.cached_property
    def folder(self) -> Path:
        """Where files made of the present sources are kept; those of earlier ones are removed."""
        digest = hashlib.sha256(subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout)
        for source in self.sources:
            for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
                if path.is_file() and path.suffix != ".pyc":
                    digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
        folder = self.parent / digest.hexdigest()[:16]
        self.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.parent.iterdir():
            if stale != folder:
                shutil.rmtree(stale, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        return folder


OBJECTS = Kept("objects", CSRC)  # of CUDA sources


def compile_objects(sources: Iterable[Path], kept: Kept = OBJECTS, *options: str) -> list[Path]:
    """Objects of CUDA or C++ sources for a shared library, which are compiled side by side.

    Kernels are compiled to PTX for compute_80 alone: whoever uses these objects runs no machine code.
    """

    def compile_one(source: Path) -> Path:
        command = [NVCC, *FLAGS, "-arch=compute_80", "-Xcompiler", "-fPIC", *options, "-c", str(source)]
        return kept.file(command, lambda path: run([*command, "-o", str(path)]), ".o")

    with ThreadPoolExecutor(os.cpu_count()) as several:
        return list(several.map(compile_one, sources))


def run(command: list[str]) -> str:
    """What a compiler, or what looks into its files, prints.

    Raises:
        RuntimeError: it failed; the text has its output.
    """
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # is not the compiler's
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout
