"""The pager of csrc/cuda over a CUDA runtime that is acted out in the host's memory, for both signatures of CUDA."""

import functools
import importlib.util
import sysconfig
from pathlib import Path

import pytest

from support.shared_library import compile_library

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
VERSIONS = 12090, 13000
SOURCES = [HERE / "runtime.cpp", HERE / "module.cpp", CSRC / "cuda/paged.cpp", CSRC / "cuda/paged_module.cpp"]


@functools.cache
def load(version: int):
    """The module: Pager as it ships, and runtime.h."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    name = f"fake{version}"
    flags = ["-std=c++20", "-O0", "-g1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    includes = [f"-I{each}" for each in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    library = compile_library(name, SOURCES, [*flags, *includes, f"-DCUDART_VERSION={version}", f"-DNAME={name}"])
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
