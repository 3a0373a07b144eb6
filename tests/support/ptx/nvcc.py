"""nvcc as the tests of the kernels use it. What it makes of the sources is kept in build/ (bench/harness/nvcc.py)."""

import functools
import re
from pathlib import Path

from bench.harness.nvcc import CSRC, FLAGS, NVCC, OBJECTS, ROOT, Kept, compile_objects, find_nvcc, run

__all__ = ["ARCHITECTURES", "CSRC", "compile_library", "compile_ptx", "find_nvcc"]

ARCHITECTURES = re.findall(r"(\w+)-real", (ROOT / "CMakeLists.txt").read_text())
HERE = Path(__file__).parent
KEPT = Kept("ptx", CSRC, *sorted(HERE.glob("*.c*")))


@functools.cache
def compile_ptx(source: Path, architecture: str, *flags: str) -> str:
    """The PTX of a source, for compute_<architecture>."""
    command = [NVCC, *FLAGS, *flags, f"-arch=compute_{architecture}", "-ptx", str(source)]
    return KEPT.file(command, lambda path: run([*command, "-o", str(path)])).read_text()


def compile_library(sources: list[Path], *options: str) -> Path:
    """A shared library of CUDA sources."""

    def make(library: Path) -> None:
        objects = [
            *compile_objects([source for source in sources if source.is_relative_to(CSRC)], OBJECTS),
            *compile_objects([source for source in sources if not source.is_relative_to(CSRC)], KEPT),
        ]
        run([NVCC, "-arch=compute_80", "-shared", *options, "-o", str(library), *map(str, objects)])

    return KEPT.file([*FLAGS, *options, *map(str, sources)], make)
