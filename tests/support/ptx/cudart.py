"""The launchers of csrc/cuda as they ship: their host code runs, and what it launches goes to the interpreter."""

import ctypes
import functools
import re
import subprocess
from pathlib import Path

from support.ptx.device import Buffer, Device
from support.ptx.grid import Launch
from support.ptx.memory import PtxError
from support.ptx.nvcc import CSRC, compile_library

LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_uint64,
    ctypes.c_int,
)
FILL = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64)
FETCH = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)


@functools.cache
def build() -> tuple[Path, dict[str, str]]:
    """The library of all launchers, and its functions: plain name -> mangled name.

    A CUDA build of torch brings the real runtime into the process, where its functions come first in the search for a
    name. `-Bsymbolic` makes the library call its own, and `-z defs` makes a function that cudart.cpp lacks an error of
    the linker, where it would have been one of the real runtime's.
    """
    sources = [*sorted(CSRC.glob("cuda/*.cu")), Path(__file__).with_suffix(".cpp")]
    library = compile_library(sources, "--cudart", "none", "-Xlinker", "-Bsymbolic,-z,defs")
    listings = (
        subprocess.run(["nm", "-D", *flag, library], capture_output=True, text=True, check=True).stdout.splitlines()
        for flag in ([], ["-C"])
    )
    names = {}
    for mangled, plain in zip(*listings, strict=True):
        if match := re.search(r" T nf4lora::cuda::(\w+)\(", plain):
            names[match[1]] = mangled.split()[-1]
    return library, names


def _without_hash(name: str) -> str:
    """nvcc names an anonymous namespace after a hash of the compilation, which differs between library and PTX."""
    return re.sub(r"__[0-9a-f]{8}(_\d+_\w+?_cu_)[0-9a-f]{8}", r"\1", name)


class Launchers:
    """`launchers.nf4_quantize(...)` calls that function of csrc/cuda/launch.h on the buffers of a device.

    A buffer becomes a device pointer, None a null pointer; it returns None or the error text, as the function does, or
    what a function with another `result` returns. `card` is the device of cudart.cpp that they ask about its size.
    """

    def __init__(self, device: Device, card: int = 0):
        self._device, self._card = device, card
        library, self._names = build()
        self._library = ctypes.CDLL(str(library))
        self._error: BaseException | None = None
        self._kernels = {_without_hash(name): kernel for name, kernel in device.kernels.items()}
        self._handlers = LAUNCH(self._launch), FILL(self._fill), FETCH(self._fetch)  # kept alive here
        self.launches: list[str] = []
        self.only_last_block = False  # of each grid; the kernels may then be of any size

    def __getattr__(self, name: str):
        function = getattr(self._library, self._names[name])

        def call(*arguments, result=ctypes.c_char_p):
            function.restype = result
            self._library.nf4lora_test_handlers(*self._handlers, self._device.ptx_version, self._card)
            self._error = None
            said = function(*(_as_c(a) for a in arguments))
            if self._error is not None:
                raise self._error
            return said.decode() if isinstance(said, bytes) else said

        return call

    def fail_next(self, error: int) -> None:
        """The next question for the last error gets this answer."""
        self._library.nf4lora_test_fail_next(error)

    def _keep_error(self, function, *arguments) -> None:
        """An exception cannot travel through C; the caller raises it again."""
        try:
            if self._error is None:
                function(*arguments)
        except BaseException as error:
            self._error = error

    def _launch(self, name, grid, block, arguments, shared, early) -> None:
        def launch():
            kernel = self._kernels[_without_hash(name.decode())]
            packed = bytearray()
            for i, (at, size) in enumerate(Device.layout(kernel).values()):
                packed.extend(bytes(at - len(packed)))
                packed.extend(ctypes.string_at(arguments[i], size))
            self.launches.append(kernel.name)
            extent = Launch(tuple(grid.contents), tuple(block.contents), shared, self.only_last_block, bool(early))
            self._device.run(kernel, bytes(packed), extent)

        self._keep_error(launch)

    def _fill(self, to, value, size) -> None:
        def fill():
            self._require_valid(to, size)
            self._device.memory.data[to : to + size] = value & 0xFF
            self._device.memory.written[to : to + size] = True

        self._keep_error(fill)

    def _fetch(self, to, source, size) -> None:
        def fetch():
            self._require_valid(source, size)
            if not self._device.memory.written[source : source + size].all():
                raise PtxError("a copy to the host of memory that was never written")
            ctypes.memmove(to, self._device.memory.data[source : source + size].tobytes(), size)

        self._keep_error(fetch)

    def _require_valid(self, address: int, size: int) -> None:
        if not self._device.memory.valid[address : address + size].all():
            raise PtxError(f"out of bounds: {size} bytes at {address:#x} from the host")


def _as_c(argument):
    if isinstance(argument, Buffer):
        return ctypes.c_void_p(argument.address)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return argument  # None is a null pointer
