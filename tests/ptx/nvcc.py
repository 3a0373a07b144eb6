"""nvcc as the tests use it: the PTX of a source for one architecture, compiled once a session."""

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
ARCHITECTURES = re.findall(r"(\w+)-real", (ROOT / "CMakeLists.txt").read_text())
FLAGS = ["-std=c++20", "-O3"]  # as CMakeLists.txt has them
NVCC = "nvcc"


def find_nvcc() -> str | None:
    return shutil.which(NVCC)


@functools.cache
def compile_ptx(source: Path, architecture: str, *flags: str) -> str:
    """The PTX of a source, for compute_<architecture>."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.ptx"
        run([NVCC, *FLAGS, *flags, f"-arch=compute_{architecture}", "-ptx", str(source), "-o", str(output)])
        return output.read_text()


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
