"""Memory that remembers who touched which byte, and when: bounds, initialisation and races are checked on access."""

import numpy as np

# A stamp says which thread touched a byte and at what time. Time counts two clocks: barriers of the thread's block,
# and barriers of its warp (a block barrier counts as one). Zero means never. A byte that several threads read keeps
# the stamp of one of them and how far apart they are.
WARP_TIME_BITS, BLOCK_TIME_BITS, THREAD_BITS = 20, 20, 20
BLOCK_SHIFT, THREAD_SHIFT, SPREAD_SHIFT = 20, 40, 60
WARP_TIME, BLOCK_TIME, MAX_THREADS = (1 << 20) - 1, (1 << 20) - 1, (1 << 20) - 1
ONE_THREAD, ONE_WARP, ONE_BLOCK, MANY_BLOCKS = 0, 1, 2, 3  # spreads
ATOMIC = 1 << 62  # the last write was atomic


class PtxError(AssertionError):
    """What a GPU would have done wrong, or what the interpreter does not know."""


class Clock:
    """The stamps of every thread of a launch, and the rule which stamps come before which."""

    def __init__(self, threads: int, block: int):
        if threads >= MAX_THREADS:
            raise PtxError(f"the interpreter runs fewer than {MAX_THREADS} threads a launch, got {threads}")
        self.block, self.warps = block, (block + 31) // 32
        self.now = np.arange(1, threads + 1, dtype=np.int64) << THREAD_SHIFT

    def after_block_barrier(self, threads: np.ndarray) -> None:
        self.now[threads] += (1 << BLOCK_SHIFT) + 1

    def after_warp_barrier(self, threads: np.ndarray) -> None:
        self.now[threads] += 1

    def _place(self, stamp):
        """Thread, warp and block of a stamp, numbered over the whole grid."""
        thread = (stamp >> THREAD_SHIFT & MAX_THREADS) - 1
        block = thread // self.block
        return thread, block * self.warps + (thread - block * self.block) // 32, block

    def spread(self, old, now):
        """How far apart the threads behind both stamps are; ONE_THREAD where `old` is never."""
        (thread, warp, block), (my_thread, my_warp, my_block) = self._place(old), self._place(now)
        apart = np.where(warp == my_warp, ONE_WARP, np.where(block == my_block, ONE_BLOCK, MANY_BLOCKS))
        apart = np.maximum(np.where(thread == my_thread, ONE_THREAD, apart), old >> SPREAD_SHIFT & 3)
        return np.where(old == 0, ONE_THREAD, apart)

    def before(self, old, now):
        """True where what `old` did is visible to `now`: same thread, or a barrier of both lies in between."""
        if not np.any(old):
            return np.ones(np.shape(old), bool)
        spread = self.spread(old, now)
        block_barrier = (old >> BLOCK_SHIFT & BLOCK_TIME) < (now >> BLOCK_SHIFT & BLOCK_TIME)
        warp_barrier = (old & WARP_TIME) < (now & WARP_TIME)
        return (spread == ONE_THREAD) | ((spread == ONE_WARP) & warp_barrier) | ((spread <= ONE_BLOCK) & block_barrier)


class Memory:
    """A flat array of bytes; an address is valid where `allocate` placed something."""

    def __init__(self, size: int, name: str, poison: bool, base: int = 0):
        self.name, self.poison = name, poison  # poison: unwritten bytes read as NaN; else reading them is an error
        self.data = np.full(size, 0xFF, np.uint8)
        self.valid, self.written = np.zeros(size, bool), np.zeros(size, bool)
        self.reads, self.writes = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.base = self.used = base  # below base nothing is valid
        self.pending: np.ndarray | None = None  # bytes of a kernel that this one started beside

    def allocate(self, size: int, alignment: int = 16, gap: int = 0) -> int:
        """Returns an address; `gap` bytes after it stay invalid."""
        start = -(-self.used // alignment) * alignment
        if start + size + gap > len(self.data):
            raise PtxError(f"{self.name} memory has {len(self.data)} bytes, {start + size + gap} are needed")
        self.valid[start : start + size] = True
        self.used = start + size + gap
        return start

    def forget_accesses(self, still_running: bool = False) -> None:
        """A kernel boundary orders everything before it; `still_running`: but what the last kernel wrote."""
        self.pending = self.writes > 0 if still_running else None
        self.reads[self.base : self.used] = 0
        self.writes[self.base : self.used] = 0

    def _rows(self, at: np.ndarray, width: int) -> np.ndarray:
        """Row numbers of addresses in any of the arrays reshaped to [-1, width]."""
        if (at % width).any():
            raise PtxError(f"misaligned: {width} bytes at {self.name} address {int(at[at % width > 0][0]):#x}")
        inside = (at >= 0) & (at + width <= len(self.data))
        rows = np.where(inside, at, 0) // width
        inside &= self.valid.reshape(-1, width)[rows].all(axis=1)
        if not inside.all():
            raise PtxError(f"out of bounds: {width} bytes at {self.name} address {int(at[~inside][0]):#x}")
        return rows

    def load(self, at: np.ndarray, width: int, clock: Clock, now: np.ndarray, constant: bool = False) -> np.ndarray:
        """The bytes [threads, width] at addresses `at`.

        `constant`: nobody may write them in the whole launch, nor the kernel before where that may still be running at
        its start, whether or not this one has waited for it.
        """
        rows, mine = self._rows(at, width), now[:, None]
        if not self.poison and not self.written.reshape(-1, width)[rows].all():
            raise PtxError(f"read of {self.name} memory that was never written")
        last = self.writes.reshape(-1, width)[rows]
        if constant and last.any():
            raise PtxError(f"ld.nc of {self.name} memory that this launch writes")
        if constant and self.pending is not None and self.pending.reshape(-1, width)[rows].any():
            raise PtxError(f"ld.nc of {self.name} memory that the kernel before wrote, beside which this one started")
        if not clock.before(last, mine).all():
            raise PtxError(f"race: a read of {self.name} memory is not ordered after another thread's write")

        reads = self.reads.reshape(-1, width)
        before = reads[rows]
        before[clock.before(before, mine)] = 0  # whoever comes after me comes after them
        reads[rows] = mine
        together = reads[rows]  # where threads of this instruction share a byte, the stamp of one of them
        if before.any() or (together != mine).any():
            spread = np.maximum(clock.spread(before, mine), clock.spread(together, mine))
            for how_far in (ONE_WARP, ONE_BLOCK, MANY_BLOCKS):  # the widest is written last and stays
                thread, column = np.nonzero(spread == how_far)
                reads[rows[thread], column] = now[thread] | how_far << SPREAD_SHIFT
        return self.data.reshape(-1, width)[rows]

    def require_finished(self, at: np.ndarray, width: int) -> None:
        """For threads that have not waited for the kernel before theirs."""
        if self.pending is not None and self.pending.reshape(-1, width)[self._rows(at, width)].any():
            raise PtxError("race: an access to what the kernel before wrote, without griddepcontrol.wait")

    def _require_exclusive(self, rows, width, clock, mine, atomic: bool) -> np.ndarray:
        last = self.writes.reshape(-1, width)[rows]
        if not (clock.before(last, mine) | (atomic & (last & ATOMIC > 0))).all():
            raise PtxError(f"race: a write to {self.name} memory is not ordered after another thread's write")
        if not clock.before(self.reads.reshape(-1, width)[rows], mine).all():
            raise PtxError(f"race: a write to {self.name} memory is not ordered after another thread's read")
        return last

    def store(self, at: np.ndarray, values: np.ndarray, clock: Clock, now: np.ndarray) -> None:
        """Writes values [threads, width] at addresses `at`."""
        width = values.shape[1]
        rows, mine = self._rows(at, width), now[:, None]
        self._require_exclusive(rows, width, clock, mine, atomic=False)
        writes = self.writes.reshape(-1, width)
        writes[rows] = mine
        if (writes[rows] != mine).any():
            raise PtxError(f"race: two threads write one byte of {self.name} memory in one instruction")
        self.data.reshape(-1, width)[rows] = values
        self.written.reshape(-1, width)[rows] = True

    def atomic(self, at: np.ndarray, values: np.ndarray, update, clock: Clock, now: np.ndarray) -> np.ndarray:
        """One thread after another: memory = update(memory, value); returns what each found there."""
        width = values.dtype.itemsize
        rows = self._rows(at, width)
        if not self.written.reshape(-1, width)[rows].all():
            raise PtxError(f"atomic on {self.name} memory that was never written")
        memory, found = self.data.view(values.dtype), np.empty_like(values)
        writes = self.writes.reshape(-1, width)
        for i, row in enumerate(rows):
            last = self._require_exclusive(rows[i : i + 1], width, clock, now[i], atomic=True)
            writes[row] = now[i] | clock.spread(last[0], now[i]) << SPREAD_SHIFT | ATOMIC
            found[i] = memory[row]
            memory[row] = update(memory[row], values[i])
        return found
