"""nvcc as the tests use it: PTX of a source for one architecture, compiled once a session."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ["80", "86", "89", "90a", "100a", "120a"]  # those that CMakeLists.txt builds
FLAGS = ["-std=c++20", "-O3", f"-I{CSRC}"]


def find_nvcc() -> str | None:
    return shutil.which("nvcc")


@functools.cache
def compile_ptx(source: Path, architecture: str, defines: tuple[str, ...] = ()) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.ptx"
        flags = [*FLAGS, *(f"-D{d}" for d in defines), f"-arch=compute_{architecture}"]
        run([find_nvcc() or "nvcc", *flags, "-ptx", str(source), "-o", str(output)])
        return output.read_text()


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
