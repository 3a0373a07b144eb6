"""The loops with NEON beside the portable ones, on 64-bit ARM: compiled for it, and run there or under qemu.

csrc/cpu/isa/neon.h is otherwise executed by no test on another machine.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.shared_library import ROOT, compiled

DRIVER = Path(__file__).parent / "support/isa/compare.cpp"
LOOPS = ROOT / "csrc/cpu/isa/loops.cpp"
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-maybe-uninitialized", f"-I{ROOT / 'csrc'}"]


@pytest.fixture(scope="module")
def arm() -> tuple[str, list[str]]:
    """A compiler for 64-bit ARM, and what its programs are run with."""
    if platform.machine() in ("aarch64", "arm64"):
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        return (compiler, []) if compiler else pytest.skip("no C++ compiler")
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ (in Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu)")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no qemu-aarch64 (in Debian and Ubuntu: apt-get install qemu-user-static)")
    return compiler, [emulator]


@pytest.mark.slow
def test_neon_is_the_portable_set(arm):
    compiler, runner = arm
    command = [compiler, *FLAGS]
    with ThreadPoolExecutor() as pool:
        objects = pool.map(
            lambda name: compiled(f"{name}.o", [*command, "-c", f"-DNF4LORA_ISA={name}"], [LOOPS]), ["scalar", "neon"]
        )
    link = [*command, "-static", "-DFIRST=scalar", "-DSECOND=neon"]
    program = compiled("compare.elf", link, [DRIVER, *objects])
    result = subprocess.run([*runner, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" comparisons, 0 differ\n")
