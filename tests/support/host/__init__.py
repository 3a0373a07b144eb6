"""The CUDA kernels of lora_linear without a card: csrc/cuda/lora_*.cpp as they ship, for CPU tensors.

Plain loops (launchers.cpp) replace every launcher, and torch's products are those of the CPU. So what is tested is what
lies between the op and the launchers: sizes, strides, offsets, which calls are made and in which order. The launchers
themselves are tested in test_ptx_*.py.
"""

import ctypes
import functools
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pybind11
import torch

from nf4lora.ops.kernels import dispatch

from support.shared_library import ROOT, compile_library

FOLDER = Path(__file__).parent
NAMES = ("kept_weights", "lora_few", "lora_fused", "lora_dense", "lora_group")


@functools.cache
def library() -> ctypes.CDLL:
    torch_folder = Path(torch.__file__).parent
    own = [FOLDER / name for name in ("library.cpp", "launchers.cpp")]
    includes = [torch_folder / "include", pybind11.get_include(), sysconfig.get_path("include")]
    flags = [
        *("-std=c++20", "-O2", "-ffp-contract=off", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        *(f"-isystem{path}" for path in includes),
        *(f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"),
    ]
    path = compile_library("host", [*own, *(ROOT / "csrc/cuda" / f"{name}.cpp" for name in NAMES)], flags)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


def launches() -> list[str]:
    """Names of the launchers that were called since the last question, in order."""
    text = ctypes.create_string_buffer(1 << 16)
    library().nf4lora_host_launches(text, len(text))
    return text.value.decode().split()


@contextmanager
def workspace(nbytes: int):
    """Let a call take so many bytes of work space inside."""
    library().nf4lora_host_workspace(ctypes.c_int64(nbytes))
    try:
        yield
    finally:
        library().nf4lora_host_workspace(ctypes.c_int64(512 << 20))


def keep_next(nbytes: int = 1 << 30) -> None:
    """Let the next forward pass keep its W, where all that are kept take no more than these bytes."""
    library().nf4lora_host_keep(ctypes.c_int64(nbytes))


def drop_kept() -> None:
    library().nf4lora_host_drop()


class Kernel:
    """`Kernel("dense").lora_linear(...)`: one of few, fused, dense, with the arguments of torch.ops.nf4lora."""

    def __init__(self, name: str):
        self.name = name
        self.__name__ = name

    def lora_linear(self, *arguments, **options):
        library()
        return getattr(torch.ops.nf4lora_host, self.name)(*arguments, **options)

    def lora_linear_backward(self, *arguments, **options):
        library()
        return getattr(torch.ops.nf4lora_host, f"{self.name}_backward")(*arguments, **options)


class OnCard:
    """The same for tensors on a card, by the op that ships."""

    def __init__(self, name: str):
        self.name = self.__name__ = name

    def lora_linear(self, *arguments, **options):
        with dispatch.forcing(self.name):
            return torch.ops.nf4lora.lora_linear(*arguments, **options)

    def lora_linear_backward(self, *arguments, **options):
        with dispatch.forcing(self.name):
            return torch.ops.nf4lora.lora_linear_backward(*arguments, **options)


def kernel(name: str, device: str):
    """Few, fused or dense for tensors of this device."""
    return Kernel(name) if torch.device(device).type == "cpu" else OnCard(name)
