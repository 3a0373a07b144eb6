"""Asynchronous copies to shared memory, and the matrix instructions of a warp."""

import numpy as np

from ptx.grid import Grid, elements, operation
from ptx.instructions import write_memory
from ptx.memory import PtxError
from ptx.parser import Immediate, Instruction


@operation("cp")
def copy_async(grid: Grid, instruction: Instruction) -> None:
    """cp.async. The bytes arrive when the thread waits for them, or, with grid.late_copies False, at once: a kernel
    must be right both ways."""
    form = instruction.modifiers[1]
    if form == "commit_group":
        grid.copy_group[grid.threads] += 1
    elif form in ("wait_group", "wait_all"):
        open_groups = instruction.operands[0].bits if form == "wait_group" else 0
        if form == "wait_all":
            grid.copy_group[grid.threads] += 1
        _arrive(grid, open_groups)
    elif form in ("ca", "cg"):
        target, source, size, *rest = instruction.operands
        if not isinstance(size, Immediate) or size.bits not in (4, 8, 16):
            raise PtxError("unsupported size")
        taken = grid.read(rest[0], "u32") if rest else np.full(len(grid.threads), size.bits, np.uint32)
        if not np.isin(taken, (0, size.bits)).all():
            raise PtxError("unsupported: a copy of only a part")
        copy = grid.address(target), grid.address(source), size.bits, taken > 0, grid.threads
        if grid.late_copies:
            grid.pending_copies.append((grid.copy_group[grid.threads], copy, instruction))
        else:
            _copy(grid, *copy)
    else:
        raise PtxError("unsupported form of cp")


def _arrive(grid: Grid, open_groups: int) -> None:
    """Finishes the copies of the waiting threads, all but those of their latest `open_groups` groups."""
    waits = np.zeros(grid.size, bool)
    waits[grid.threads] = True
    remaining = []
    for groups, copy, instruction in grid.pending_copies:
        threads = copy[-1]
        done = waits[threads] & (groups < grid.copy_group[threads] - open_groups)
        if done.any():
            try:
                _copy(grid, *(part if isinstance(part, int) else part[done] for part in copy))
            except PtxError as error:
                raise grid.error(instruction, str(error)) from None
        if not done.all():
            remaining.append((groups[~done], tuple(p if isinstance(p, int) else p[~done] for p in copy), instruction))
    grid.pending_copies = remaining


def _copy(grid: Grid, target, source, size: int, taken, threads) -> None:
    values = np.zeros((len(threads), size), np.uint8)  # a copy of nothing fills with zeros
    if taken.any():
        now = grid.clock.now[threads[taken]]
        values[taken] = grid.global_memory.load(source[taken], size, grid.clock, now)
    write_memory(grid, "shared", target, values, threads)


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
