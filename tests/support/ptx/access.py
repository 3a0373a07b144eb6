"""Instructions that touch memory: loads, stores, atomics, asynchronous copies."""

import numpy as np

from support.ptx.grid import SIGNED, Grid, dtype_of, elements, operation
from support.ptx.instructions import require_known
from support.ptx.memory import PtxError
from support.ptx.parser import Immediate, Instruction


def _widths(instruction: Instruction) -> tuple[str, int, int]:
    """Element type, bytes of an element, number of elements."""
    vector = next((int(m[1]) for m in instruction.modifiers if m in ("v2", "v4")), 1)
    require_known(instruction, "param", "const", "global", "shared", "v2", "v4")
    return instruction.type, dtype_of(instruction.type).itemsize, vector


@operation("ld")
def load(grid: Grid, instruction: Instruction) -> None:
    to, source = instruction.operands
    kind, size, vector = _widths(instruction)
    space, address = instruction.modifiers[0], grid.address(source)
    now = grid.clock.now[grid.threads]
    if space == "param":
        arguments = np.frombuffer(grid.arguments, np.uint8)  # blocks may read different entries of a table
        at = address[:, None].astype(np.int64) + np.arange(size * vector)
        if at.size and (at.min() < 0 or at.max() >= len(arguments)):
            raise PtxError("out of bounds: a load beyond the parameters of the kernel")
        values = arguments[at]
    elif space == "shared":
        at = grid.shared_address(address, grid.threads)
        values = grid.shared_memory.load(at, size * vector, grid.clock, now)
    elif space in ("global", "const"):
        grid.global_memory.require_finished(address[~grid.waited[grid.threads]], size * vector)
        constant = space == "const" or "nc" in instruction.modifiers
        values = grid.global_memory.load(address, size * vector, grid.clock, now, constant)
    else:
        raise PtxError("unsupported address space")
    values = np.ascontiguousarray(values).view(f"u{size}")
    for i, register in enumerate(elements(to)):
        column = np.ascontiguousarray(values[:, i])
        grid.write(register, column.view(SIGNED[kind[1:]]) if kind[0] == "s" else column)


@operation("st")
def store(grid: Grid, instruction: Instruction) -> None:
    target, source = instruction.operands
    _, size, _ = _widths(instruction)
    values = np.stack([grid.read(e, f"u{8 * size}") for e in elements(source)], axis=1).view(np.uint8)
    write_memory(grid, instruction.modifiers[0], grid.address(target), values, grid.threads)


def write_memory(grid: Grid, space: str, address: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
    now = grid.clock.now[threads]
    if space == "shared":
        grid.shared_memory.store(grid.shared_address(address, threads), values, grid.clock, now)
    elif space == "global":
        grid.global_memory.require_finished(address[~grid.waited[threads]], values.shape[1])
        grid.global_memory.store(address, values, grid.clock, now)
    else:
        raise PtxError("unsupported address space")


ATOMIC = {"add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or, "exch": lambda _, value: value}


@operation("atom", "red")
def atomic(grid: Grid, instruction: Instruction) -> None:
    """Integers only: a float sum in the order of arrival would differ from run to run."""
    if instruction.type[0] == "f":
        raise PtxError("an atomic on floats is not deterministic")
    require_known(instruction, "global", "shared", *ATOMIC)
    *to, target, source = instruction.operands
    address, memory = grid.address(target), grid.global_memory
    if instruction.modifiers[0] == "shared":
        address, memory = grid.shared_address(address, grid.threads), grid.shared_memory
    update = next(ATOMIC[m] for m in instruction.modifiers if m in ATOMIC)
    values = grid.read(source, instruction.type)
    found = memory.atomic(address, values, update, grid.clock, grid.clock.now[grid.threads])
    for register in to:
        grid.write(register, found)


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
        grid.global_memory.require_finished(source[taken & ~grid.waited[threads]], size)
        now = grid.clock.now[threads[taken]]
        values[taken] = grid.global_memory.load(source[taken], size, grid.clock, now)
    write_memory(grid, "shared", target, values, threads)


@operation("griddepcontrol")
def grid_dependency(grid: Grid, instruction: Instruction) -> None:
    """Kernels run one after the other here; what counts is whether a thread waits before it touches the last one's."""
    form = instruction.modifiers[0]
    if form not in ("wait", "launch_dependents"):
        raise PtxError("unsupported form of griddepcontrol")
    grid.waited[grid.threads] |= form == "wait"
