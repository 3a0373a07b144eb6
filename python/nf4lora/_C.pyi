"""The compiled module (csrc/module.cpp): loading it registers the ops; it exports the format and the build."""

__version__: str
FORMAT_VERSION: int
CODE: tuple[float, ...]  # the 16 NF4 values, ascending
NESTED_CODE: tuple[float, ...]  # the 256 values of the 8-bit map, ascending
SQUARE_CODE: tuple[float, ...]  # the 256 values of the unsigned 8-bit map, ascending
MOMENT_BLOCKSIZE: int
BLOCKSIZE: int
BLOCKSIZES: tuple[int, ...]
NESTED_BLOCKSIZE: int
COMPILER: str
CUDA_VERSION: str  # of the toolkit this was built with, "" without CUDA
CUDA_ARCHS: str
BUILD_TORCH: str

def cpu_instruction_set() -> str: ...
def cpu_instruction_sets() -> list[str]: ...
def force_cpu_instruction_set(name: str) -> None: ...
