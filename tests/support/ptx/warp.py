"""Instructions that the lanes of a warp execute together: shuffles, the warp barrier, the matrix instructions."""

import numpy as np

from support.ptx.grid import Grid, elements, operation
from support.ptx.memory import PtxError
from support.ptx.parser import Instruction


@operation("shfl", warp=True)
def shuffle(grid: Grid, instruction: Instruction) -> None:
    to, value, offset, clamp, _ = instruction.operands
    x, by, bounds = (grid.read(o, "u32") for o in (value, offset, clamp))
    lane, by = grid.lane[grid.threads], (by & 31).astype(np.int64)
    segment = (bounds >> 8 & 31).astype(np.int64)
    last = lane & segment | (bounds & 31).astype(np.int64) & ~segment
    mode = instruction.modifiers[1]
    source = {"bfly": lane ^ by, "idx": lane & segment | by & ~segment, "down": lane + by, "up": lane - by}[mode]
    inside = source >= last if mode == "up" else source <= last
    source = np.where(inside, source, lane)
    everyone = np.full(grid.size + 32, -1, np.int64)
    everyone[grid.threads] = np.arange(len(grid.threads))
    found = everyone[grid.threads - lane + source]
    if (found < 0).any():
        raise PtxError("divergence: shfl reads a lane that takes no part in it")
    register, *predicate = elements(to)
    grid.write(register, x[found])
    for p in predicate:
        grid.write(p, inside)


@operation("bar", warp=True)
def warp_barrier(grid: Grid, instruction: Instruction) -> None:
    if (grid.read(instruction.operands[0], "u32") != 0xFFFFFFFF).any():
        raise PtxError("unsupported: a warp barrier of only some lanes")
    grid.clock.after_warp_barrier(grid.threads)


@operation("ldmatrix", warp=True)
def load_matrix(grid: Grid, instruction: Instruction) -> None:
    """Lane l of a group of eight names row l of an 8x8 matrix of 16-bit values; each lane gets two of each matrix."""
    to, source = instruction.operands
    registers = elements(to)
    if "m8n8" not in instruction.modifiers or instruction.type != "b16" or len(grid.threads) % 32:
        raise PtxError("unsupported form of ldmatrix")
    address = grid.address(source).reshape(-1, 32)[:, : 8 * len(registers)].reshape(-1, len(registers), 8)
    lane = np.arange(32)
    now = grid.clock.now[grid.threads]
    if (address % 16).any():
        raise PtxError("misaligned: a row of ldmatrix starts at a multiple of 16 bytes")
    for i, register in enumerate(registers):
        if "trans" in instruction.modifiers:
            rows = [(lane % 4 * 2 + half, lane // 4 * 2) for half in (0, 1)]
        else:
            rows = [(lane // 4, lane % 4 * 4 + 2 * half) for half in (0, 1)]
        halves = []
        for row, column in rows:
            at = grid.shared_address((address[:, i, row] + column).reshape(-1), grid.threads)
            read = grid.shared_memory.load(at, 2, grid.clock, now)
            halves.append(np.ascontiguousarray(read).view(np.uint16)[:, 0].astype(np.uint32))
        grid.write(register, halves[0] | halves[1] << 16)


WIDEN = {
    "bf16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
    "f16": lambda bits: bits.astype(np.uint16).view(np.float16).astype(np.float32),
}


@operation("mma", warp=True)
def matrix_multiply(grid: Grid, instruction: Instruction) -> None:
    """D = A B + C of m16n8k16 with 16-bit A and B and float32 sums. The order of summation is not the hardware's,
    which is not documented."""
    if "m16n8k16" not in instruction.modifiers or instruction.modifiers[-4] != "f32" or len(grid.threads) % 32:
        raise PtxError("unsupported form of mma")
    d, a, b, c = (elements(o) for o in instruction.operands)
    widen, warps, lane = WIDEN[instruction.modifiers[-2]], len(grid.threads) // 32, np.arange(32)
    group, member = lane // 4, lane % 4
    A, B = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
    C = np.zeros((warps, 16, 8), np.float32)
    for half in (0, 1):
        column = 2 * member + half
        for i, register in enumerate(a):
            bits = grid.read(register, "u32").reshape(warps, 32) >> 16 * half & 0xFFFF
            A[:, group + i % 2 * 8, column + i // 2 * 8] = widen(bits)
        for i, register in enumerate(b):
            bits = grid.read(register, "u32").reshape(warps, 32) >> 16 * half & 0xFFFF
            B[:, column + i * 8, group] = widen(bits)
    for i, register in enumerate(c):
        C[:, group + i // 2 * 8, 2 * member + i % 2] = grid.read(register, "f32").reshape(warps, 32)
    D = C + A @ B
    for i, register in enumerate(d):
        grid.write(register, np.ascontiguousarray(D[:, group + i // 2 * 8, 2 * member + i % 2]).reshape(-1))
