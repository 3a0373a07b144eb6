"""The pager of csrc/cuda over a CUDA runtime that is acted out in the host's memory, for both signatures of CUDA."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
VERSIONS = 12090, 13000
SOURCES = [HERE / "runtime.cpp", HERE / "module.cpp", CSRC / "cuda/paged.cpp", CSRC / "cuda/paged_module.cpp"]


@functools.cache
def load(version: int):
    """The module: Pager as it ships, and runtime.h."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    name = f"fake{version}"
    library = Path(tempfile.mkdtemp(prefix="nf4lora-")) / f"{name}.so"
    includes = [HERE, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++20", "-O0", "-g1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    flags += os.environ.get("CXXFLAGS", "").split()  # those of the sanitizers, in tools/sanitize.sh
    defined = [f"-DCUDART_VERSION={version}", f"-DNAME={name}"]
    command = [compiler, *flags, *defined, *(f"-I{each}" for each in includes), *map(str, SOURCES), "-o", str(library)]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # is not the compiler's
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
