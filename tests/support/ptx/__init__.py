"""Runs the CUDA kernels without a GPU: the PTX that nvcc emits, interpreted with numpy.

    device = Device(compile_ptx(source, "80"))      # nvcc.py
    x, y = device.upload(array), device.empty(100, np.float32)
    device.launch("my_kernel", grid=4, block=32, arguments=[x, y, 100])
    y.numpy()

What a GPU would leave silent is an error here: an access out of bounds or misaligned, a read of memory that nobody
wrote, two threads on one byte without a barrier between them, a barrier or a shuffle that some lanes never reach, an
approximate instruction (but for the seeds of a root and of a quotient, which a kernel corrects). What it cannot see:
ptxas, weak memory order, timing, occupancy.

`Launchers` (cudart.py) goes one step further and runs the real host code of the launchers, on a runtime of our own
that hands every launch to the interpreter; so grid sizes and arguments are those that ship.

Floors: parser, memory < grid < instructions < access, warp < device < cudart. An instruction that a new kernel needs
is a few lines in one of the middle three.
"""

from support.ptx.cudart import Launchers
from support.ptx.device import Buffer, Device
from support.ptx.memory import PtxError
from support.ptx.nvcc import ARCHITECTURES, compile_ptx, find_nvcc

__all__ = ["ARCHITECTURES", "Buffer", "Device", "Launchers", "PtxError", "compile_ptx", "find_nvcc"]
