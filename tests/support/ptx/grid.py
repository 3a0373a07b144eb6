"""Executes one kernel launch: all threads of all blocks as numpy vectors, in step where they are at one instruction.

Threads that sit at the same instruction form a group; the group that is furthest behind runs, until it branches,
waits, or meets another group and joins it. Compilers place code so that this brings diverged threads together again.
Blocks run side by side and do not wait for each other, as on a GPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from support.ptx.memory import Clock, Memory, PtxError
from support.ptx.parser import Address, Immediate, Instruction, Kernel, Pack, Register, Symbol

UNSIGNED = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
SIGNED = {"8": np.int8, "16": np.int16, "32": np.int32, "64": np.int64}
FLOAT = {"16": np.float16, "32": np.float32, "64": np.float64}
HANDLERS: dict[str, Callable[["Grid", Instruction], None]] = {}
WARP_HANDLERS: dict[str, Callable[["Grid", Instruction], None]] = {}  # executed when all lanes named in it are there
GENERIC_SHARED = 1 << 48  # where the shared memory of a block lies in the generic address space


def dtype_of(kind: str) -> np.dtype:
    """The numpy type of a PTX type such as u32, b16 or f64."""
    family = FLOAT if kind[0] == "f" else SIGNED if kind[0] == "s" else UNSIGNED
    return np.dtype(bool) if kind == "pred" else np.dtype(family[kind[1:]])


@dataclass(frozen=True)
class Launch:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0  # bytes of dynamic shared memory
    only_last: bool = False  # run just the last block of the grid
    early: bool = False  # it may start before the kernel before it has ended


class Grid:
    def __init__(
        self, kernel: Kernel, symbols: dict[str, int | None], memory: Memory, arguments: bytes, launch: Launch
    ):
        self.kernel, self.symbols, self.global_memory, self.arguments = kernel, dict(symbols), memory, arguments
        self.block_size, blocks = math.prod(launch.block), 1 if launch.only_last else math.prod(launch.grid)
        if self.block_size > kernel.max_threads:
            raise PtxError(f"a block of {self.block_size} threads, the kernel allows {kernel.max_threads}")
        self.size = blocks * self.block_size
        self.clock = Clock(self.size, self.block_size)
        self.thread = np.arange(self.size)
        self.in_block = self.thread % self.block_size  # thread number in its block
        self.lane, self.block = self.in_block % 32, self.thread // self.block_size
        self.warp = self.block * ((self.block_size + 31) // 32) + self.in_block // 32
        self._place_shared(blocks, launch.shared)
        self.registers: dict[str, np.ndarray] = {}
        self._special_registers(launch)
        self.threads = self.thread  # those that execute the current instruction
        self.pending_copies: list = []  # of cp.async, see access.py
        self.copy_group = np.zeros(self.size, np.int64)
        self.late_copies = True
        self.waited = np.zeros(self.size, bool)  # for the kernel before, by griddepcontrol.wait

    def _place_shared(self, blocks: int, dynamic: int) -> None:
        at = 0
        for name, variable in self.kernel.shared.items():
            at = -(-at // variable.alignment) * variable.alignment
            self.symbols[name] = at
            at += variable.size
        at = -(-at // 128) * 128
        self.symbols.update({name: at for name in self.symbols if self.symbols[name] is None})  # extern __shared__
        used = at + dynamic
        self.shared_stride = -(-(used + 16) // 128) * 128
        self.shared_memory = Memory(blocks * self.shared_stride, "shared", poison=True)
        self.shared_memory.valid.reshape(blocks, -1)[:, :used] = True
        self.shared_base = self.block * self.shared_stride

    def _special_registers(self, launch: Launch) -> None:
        thread, number = self.in_block, self.block + (math.prod(launch.grid) - 1 if launch.only_last else 0)
        for axis, threads, blocks in zip("xyz", launch.block, launch.grid, strict=True):
            values = {"tid": thread % threads, "ctaid": number % blocks, "ntid": threads, "nctaid": blocks}
            for name, value in values.items():
                self.registers[f"%{name}.{axis}"] = np.full(self.size, value, np.uint32)
            thread, number = thread // threads, number // blocks
        self.registers["%laneid"] = self.lane.astype(np.uint32)

    # ---- operands

    def error(self, instruction: Instruction, why: str) -> PtxError:
        first = int(self.threads[0]) if len(self.threads) else 0
        where = f"thread {first % self.block_size} of block {first // self.block_size}"
        return PtxError(f"{why}\n  in {instruction.text}\n  {where} of {self.kernel.name}")

    def register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            if name not in self.kernel.registers:
                raise PtxError(f"unsupported register {name}")
            kind = self.kernel.registers[name]
            dtype = np.dtype(bool) if kind == "pred" else np.dtype(UNSIGNED[kind[1:]])
            self.registers[name] = np.full(self.size, -1, np.int64).astype(dtype)  # NaN until written
        return self.registers[name]

    def read(self, operand, kind: str) -> np.ndarray:
        """The operand in every executing thread, as the numpy type of `kind`."""
        if isinstance(operand, Register):
            values = self.register(operand.name)[self.threads]
            if kind == "pred":
                return ~values if operand.negated else values
            dtype = dtype_of(kind)
            return values.astype(f"u{dtype.itemsize}", copy=False).view(dtype)
        if isinstance(operand, Immediate):
            dtype = dtype_of(kind)
            bits = np.array(operand.bits & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}")
            return np.full(len(self.threads), bits.view(dtype))
        if isinstance(operand, Symbol):
            return np.full(len(self.threads), self.symbols[operand.name], dtype_of(kind))
        raise PtxError(f"unsupported operand {operand}")

    def write(self, operand, values: np.ndarray) -> None:
        """Puts values into a register, sign- or zero-extended by their own type where it is wider."""
        if operand.name == "_":
            return
        register = self.register(operand.name)
        if values.dtype.kind == "f":
            values = values.view(f"u{values.dtype.itemsize}")
        register[self.threads] = values.astype(register.dtype, copy=False)

    def address(self, operand: Address) -> np.ndarray:
        base = self.read(operand.base, "u64")
        if isinstance(operand.base, Register) and self.register(operand.base.name).dtype == np.uint32:
            base &= np.uint64(0xFFFFFFFF)
            return (base.view(np.int64) + operand.offset) & 0xFFFFFFFF  # a 32-bit address wraps with its offset
        return base.view(np.int64) + operand.offset

    def shared_address(self, offsets: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """From offsets in the block's shared memory to offsets in that of all blocks."""
        if (offsets < 0).any() or (offsets >= self.shared_stride).any():
            raise PtxError(f"out of bounds: shared address {int(offsets.min()):#x} to {int(offsets.max()):#x}")
        return offsets + self.shared_base[threads]

    # ---- control flow

    def run(self) -> None:
        self.groups: dict[int, np.ndarray] = {0: self.thread}  # instruction -> threads about to execute it
        self.at_barrier: dict[int, np.ndarray] = {}  # instruction -> threads that wait for their block there
        self.at_warp: dict[int, np.ndarray] = {}  # instruction -> threads that wait for lanes of their warp there
        self.exited = np.zeros(self.size, bool)
        with np.errstate(all="ignore"):
            while self.groups:
                at = min(self.groups)
                self._advance(at, self.groups.pop(at))
                if not self.groups:
                    self._try_warps_again()
        self._require_finished()

    def _try_warps_again(self) -> None:
        """Lanes that exited since are no longer waited for."""
        waiting, self.at_warp = self.at_warp, {}
        for at, threads in waiting.items():
            self.threads = threads
            complete = self._complete_warps(self._member_mask(self.kernel.code[at]))
            self._join(self.groups, at, threads[complete])
            self._join(self.at_warp, at, threads[~complete])

    def _join(self, groups: dict[int, np.ndarray], at: int, threads: np.ndarray) -> None:
        if len(threads):
            groups[at] = np.sort(np.concatenate([groups[at], threads])) if at in groups else threads

    def _advance(self, at: int, threads: np.ndarray) -> None:
        code = self.kernel.code
        while True:
            if at in self.groups:
                self._join(self.groups, at, threads)
                threads = self.groups.pop(at)
            if at >= len(code):
                self.exited[threads] = True
                return
            instruction, self.threads = code[at], threads
            taken = threads
            if instruction.guard is not None:
                taken = threads[self.read(instruction.guard, "pred")]
            opcode = instruction.opcode
            if opcode in ("bra", "ret", "exit"):
                if len(taken):
                    if opcode == "bra":
                        self._join(self.groups, self.kernel.labels[instruction.operands[0].name], taken)
                    else:
                        self.exited[taken] = True
                    self._join(self.groups, at + 1, np.setdiff1d(threads, taken, assume_unique=True))
                    return
            elif opcode in ("bar", "barrier") and "warp" not in instruction.modifiers:
                self._arrive(instruction, at, taken)
                self._join(self.groups, at + 1, np.setdiff1d(threads, taken, assume_unique=True))
                return
            elif len(taken):
                self.threads = taken
                if opcode in WARP_HANDLERS:
                    threads = self._with_whole_warps(instruction, at, threads)
                    if not len(threads):
                        return
                else:
                    self._execute(HANDLERS, instruction)
            at += 1

    def _execute(self, handlers, instruction: Instruction) -> None:
        if instruction.opcode not in handlers:
            raise self.error(instruction, "unsupported instruction")
        try:
            handlers[instruction.opcode](self, instruction)
        except PtxError as error:
            if "\n  in " in str(error):
                raise
            raise self.error(instruction, str(error)) from None
        except (KeyError, ValueError, IndexError) as error:
            raise self.error(instruction, f"unsupported form ({error!r})") from error

    def _arrive(self, instruction: Instruction, at: int, threads: np.ndarray) -> None:
        """bar.sync: a block goes on when all of its threads are here."""
        if instruction.operands != (Immediate(0),):
            raise self.error(instruction, "unsupported: only barrier 0 of the whole block")
        self._join(self.at_barrier, at, threads)
        waiting = self.at_barrier[at]
        counts = np.bincount(self.block[waiting], minlength=self.size // self.block_size)
        free = (counts == self.block_size)[self.block[waiting]]
        self.clock.after_block_barrier(waiting[free])
        self._join(self.groups, at + 1, waiting[free])
        self.at_barrier[at] = waiting[~free]

    def _with_whole_warps(self, instruction: Instruction, at: int, threads: np.ndarray) -> np.ndarray:
        """Executes a warp instruction in the warps whose named lanes are all here; returns the threads that go on."""
        if instruction.guard is not None and len(self.threads) != len(threads):
            raise self.error(instruction, "divergence: only some lanes of a warp take part in a warp instruction")
        self._join(self.at_warp, at, threads)
        waiting = self.threads = self.at_warp.pop(at)
        mask = self._member_mask(instruction)
        if not (mask >> self.lane[waiting].astype(np.uint32) & 1).all():
            raise self.error(instruction, "divergence: a lane that the mask does not name takes part")
        complete = self._complete_warps(mask)
        self._join(self.at_warp, at, waiting[~complete])
        self.threads = ready = waiting[complete]
        if len(ready):
            self._execute(WARP_HANDLERS, instruction)
        return ready

    def _complete_warps(self, mask: np.ndarray) -> np.ndarray:
        """True for threads of whose warp every lane in the mask is here, has exited, or never existed."""
        missing = np.zeros(self.warp[-1] + 1, np.uint32)
        elsewhere = ~self.exited
        elsewhere[self.threads] = False
        np.bitwise_or.at(missing, self.warp[elsewhere], np.uint32(1) << self.lane[elsewhere].astype(np.uint32))
        return mask & missing[self.warp[self.threads]] == 0

    def _member_mask(self, instruction: Instruction) -> np.ndarray:
        """The lanes that a warp instruction names; whole-warp ones (ldmatrix, mma) name none and mean all."""
        if instruction.opcode in ("shfl", "bar", "vote", "redux"):
            return self.read(instruction.operands[-1], "u32")
        return np.full(len(self.threads), 0xFFFFFFFF, np.uint32)

    def _require_finished(self) -> None:
        for what, waiting in (("at a barrier", self.at_barrier), ("for lanes of their warp", self.at_warp)):
            for at, threads in waiting.items():
                if len(threads):
                    self.threads, block = threads, self.block == self.block[threads[0]]
                    count, exited = int(block[threads].sum()), int(self.exited[block].sum())
                    why = f"divergence: {count} threads of the block wait {what} forever, {exited} have exited"
                    raise self.error(self.kernel.code[at], why)


def operation(*opcodes: str, warp: bool = False):
    """Registers a function as the meaning of opcodes."""

    def register(function):
        for opcode in opcodes:
            (WARP_HANDLERS if warp else HANDLERS)[opcode] = function
        return function

    return register


def elements(operand) -> tuple:
    return operand.elements if isinstance(operand, Pack) else (operand,)
