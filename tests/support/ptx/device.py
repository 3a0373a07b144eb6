"""A device with a loaded PTX module: buffers in its memory, launches of its kernels."""

import functools
import re
from collections.abc import Sequence

import numpy as np

from support.ptx import access, instructions, warp  # noqa: F401  they register what instructions mean
from support.ptx.grid import Grid, Launch
from support.ptx.memory import Memory, PtxError
from support.ptx.parser import Kernel, parse

BASE = 1 << 16  # the first byte of memory: a null pointer is out of bounds
GAP = 1 << 12  # invalid bytes after each buffer


class Buffer:
    """An array in device memory."""

    def __init__(self, device: "Device", shape, dtype, address: int):
        self.device, self.shape, self.dtype, self.address = device, shape, np.dtype(dtype), address

    @property
    def _bytes(self) -> slice:
        return slice(self.address, self.address + int(np.prod(self.shape)) * self.dtype.itemsize)

    def numpy(self) -> np.ndarray:
        """A copy of the array; every byte of it must have been written."""
        if missing := int((~self.device.memory.written[self._bytes]).sum()):
            raise PtxError(f"{missing} bytes of a buffer of shape {self.shape} were never written")
        return self.device.memory.data[self._bytes].copy().view(self.dtype).reshape(self.shape)

    def untouched(self) -> bool:
        return not self.device.memory.written[self._bytes].any()


class Device:
    def __init__(self, *texts: str, size: int = 1 << 23):
        modules = [_parse(text) for text in texts]
        self.kernels = {name: kernel for module in modules for name, kernel in module.kernels.items()}
        self.memory = Memory(size, "global", poison=False, base=BASE)
        self.late_copies = True
        self.ptx_version = int(re.search(r"\.target\s+sm_(\d+)", texts[0])[1]) if ".target" in texts[0] else 80
        self.symbols: dict[str, int | None] = {}
        for name, variable in [item for module in modules for item in module.variables.items()]:
            if variable.space == "shared":  # of a size that the launch chooses
                self.symbols[name] = None
                continue
            address = self.symbols[name] = self.memory.allocate(variable.size, max(variable.alignment, 16), GAP)
            content = variable.content if variable.content is not None else bytes(variable.size)
            self._write(address, np.frombuffer(content, np.uint8))

    def _write(self, address: int, content: np.ndarray) -> None:
        self.memory.data[address : address + len(content)] = content
        self.memory.written[address : address + len(content)] = True

    def empty(self, shape, dtype, offset: int = 0) -> Buffer:
        """Memory that nobody has written, `offset` bytes past an alignment of 256."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self.memory.allocate(size + offset, 256, GAP) + offset
        self.memory.valid[address - offset : address] = False
        return Buffer(self, shape, dtype, address)

    def upload(self, array: np.ndarray, offset: int = 0) -> Buffer:
        buffer = self.empty(array.shape, array.dtype, offset)
        self._write(buffer.address, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return buffer

    def kernel(self, *fragments: str) -> Kernel:
        """The one kernel whose mangled name holds all fragments."""
        found = [k for n, k in self.kernels.items() if all(f in n for f in fragments)]
        if len(found) != 1:
            raise PtxError(f"{len(found)} kernels match {fragments}, of {sorted(self.kernels)}")
        return found[0]

    def launch(self, kernel: str | Kernel, grid, block, arguments: Sequence, shared: int = 0) -> None:
        """Runs a kernel to its end. Grid and block are one to three numbers; arguments are buffers and integers."""
        kernel = self.kernel(kernel) if isinstance(kernel, str) else kernel
        self.run(kernel, self._pack(kernel, arguments), Launch(_three(grid), _three(block), shared))

    def run(self, kernel: Kernel, arguments: bytes, launch: Launch) -> None:
        """The same with arguments as the bytes that the kernel will read."""
        places = {name: at for name, (at, _) in self.layout(kernel).items()}
        self.memory.forget_accesses(still_running=launch.early)
        grid = Grid(kernel, self.symbols | places, self.memory, arguments, launch)
        grid.late_copies = self.late_copies
        grid.run()

    @staticmethod
    def layout(kernel: Kernel) -> dict[str, tuple[int, int]]:
        """Offset and size of each parameter."""
        places, at = {}, 0
        for name, parameter in kernel.parameters.items():
            at = -(-at // parameter.alignment) * parameter.alignment
            places[name] = (at, parameter.size)
            at += parameter.size
        return places

    def _pack(self, kernel: Kernel, arguments: Sequence) -> bytes:
        packed, layout = bytearray(), self.layout(kernel)
        if len(layout) != len(arguments):
            raise PtxError(f"{kernel.name} takes {len(layout)} arguments, got {len(arguments)}")
        for (at, size), argument in zip(layout.values(), arguments, strict=True):
            packed.extend(bytes(at - len(packed)))
            value = argument.address if isinstance(argument, Buffer) else int(argument)
            packed.extend((value & (1 << 8 * size) - 1).to_bytes(size, "little"))
        return bytes(packed)


_parse = functools.cache(parse)


def _three(extent) -> tuple[int, int, int]:
    extent = (extent,) if isinstance(extent, int) else tuple(extent)
    return (*extent, 1, 1)[:3]
