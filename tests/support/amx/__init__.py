"""The products of csrc/cpu/isa/amx.h on any processor, over AMX's instructions acted out in plain C++ (tiles.h)."""

import ctypes
import functools
from pathlib import Path

import torch

from support.shared_library import compile_library

HERE = Path(__file__).parent


@functools.cache
def load() -> ctypes.CDLL:
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing"]
    library = compile_library("amx", [HERE / "product.cpp"], flags)
    found = ctypes.CDLL(str(library))
    found.product.restype = found.without_entering.restype = ctypes.c_int64
    return found


def product(
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    a_transposed: bool = False,
    b_columns: bool = False,
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float = 1.0,
    keep: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    chunk_steps: int = 64,
) -> torch.Tensor:
    """keep(scale * (A_low B_low)) + offset + A B, bfloat16. A: [M, K] ([K, M]); B: [N, K] ([K, N] by columns).

    keep: [M, N] bool, which sums of the low-rank product are kept
    """
    M, K = A.shape[::-1] if a_transposed else A.shape
    N = B.shape[1] if b_columns else B.shape[0]
    keep_bits = None if keep is None else -keep.to(torch.int32)  # all bits, or none
    out = torch.full((M, N), torch.nan, dtype=torch.bfloat16)
    held = [t if t is None else t.contiguous() for t in (A, B, *(low or (None, None)), keep_bits, offset)]
    for t, dtype in zip(held, [torch.bfloat16] * 4 + [torch.int32, torch.float32], strict=True):
        assert t is None or t.dtype == dtype
    at = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in held]
    sizes = [ctypes.c_int64(size) for size in (M, N, K)]
    wrongs = load().product(
        at[0], int(a_transposed), at[1], int(b_columns), *sizes, at[2], at[3],
        ctypes.c_int64(0 if low is None else low[0].shape[1]), ctypes.c_float(scale), at[4], at[5],
        ctypes.c_int64(chunk_steps), ctypes.c_void_p(out.data_ptr()),
    )  # fmt: skip
    assert wrongs == 0
    return out
