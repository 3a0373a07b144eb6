"""Where an optimizer's state lives: one arena per device, in step order, and the chunks in which a step visits it.

An arena that cannot hold everything close by (a file, unified memory, pinned memory behind a card) brings the next
chunk while the present one is updated. Offsets and sizes are bytes of the arena.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nf4lora import _C

HUGE_PAGE = 2 << 20
ALIGNMENT = 128  # of each tensor: a cache line of the GPU, two of the CPU
PIECE = 4096  # values; a tensor is cut at multiples of it, so that blocks of 8-bit moments and pages stay whole
CHUNK_BYTES = 32 << 20  # long enough to hide the call that brings it, short enough for three in a card's free memory

Range = tuple[int, int]  # offset, bytes
Tensors = tuple[Tensor, ...]  # exp_avg, exp_avg_sq and, in 8 bits, absmax


@dataclass(frozen=True)
class Slot:
    """The state of one parameter: exp_avg, exp_avg_sq and, in 8 bits, absmax [blocks, 2], one behind the other."""

    offset: int
    count: int  # values
    blocks: int | None  # rows of absmax, one per 256 values; None in 32 bits

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of exp_avg, exp_avg_sq and absmax."""
        if self.blocks is None:
            return torch.float32, torch.float32
        return torch.uint8, torch.uint8, torch.float32

    def ranges(self, begin: int, end: int) -> list[Range]:
        """Of values [begin, end) in exp_avg, exp_avg_sq and, in 8 bits, absmax; begin is a multiple of a block."""
        size, block = self.dtypes[0].itemsize, _C.MOMENT_BLOCKSIZE
        second = self.offset + _aligned(self.count * size)
        found = [(start + begin * size, (end - begin) * size) for start in (self.offset, second)]
        if self.blocks is not None:
            first, last = begin // block, -(-end // block)
            found.append((second + _aligned(self.count) + 8 * first, 8 * (last - first)))
        return found

    @property
    def whole(self) -> list[Range]:
        """Of all values, with the rows of absmax that a shard may have beyond its blocks."""
        *moments, last = self.ranges(0, self.count)
        return [*moments, last if self.blocks is None else (last[0], 8 * self.blocks)]

    @property
    def bytes(self) -> int:
        start, size = self.whole[-1]
        return _aligned(start + size - self.offset)


@dataclass(frozen=True)
class Piece:
    """Values [begin, end) of a slot, and its tensors' ranges."""

    slot: int
    begin: int
    end: int


@dataclass(frozen=True)
class Chunk:
    """Pieces that are visited together; `ranges` covers them."""

    pieces: tuple[Piece, ...]
    ranges: tuple[Range, ...]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def lay_out(counts: Sequence[tuple[int, int | None]]) -> tuple[list[Slot], int]:
    """Slots of (values, blocks) in this order, and the bytes of all."""
    slots, offset = [], 0
    for count, blocks in counts:
        slots.append(Slot(offset, count, blocks))
        offset += slots[-1].bytes
    return slots, offset


def cut(slots: Sequence[Slot], chunk_bytes: int) -> list[Chunk]:
    """Chunks of at most chunk_bytes, or of one piece of PIECE values where that is more."""
    chunks: list[Chunk] = []
    whole: list[Piece] = []

    def close() -> None:
        if whole:
            start = slots[whole[0].slot].offset
            last = slots[whole[-1].slot]
            chunks.append(Chunk(tuple(whole), ((start, last.offset + last.bytes - start),)))
            whole.clear()

    for index, slot in enumerate(slots):
        if slot.bytes > chunk_bytes and slot.count > PIECE:
            close()
            values = max(1, chunk_bytes * slot.count // slot.bytes // PIECE) * PIECE
            for begin in range(0, slot.count, values):
                end = min(begin + values, slot.count)
                chunks.append(Chunk((Piece(index, begin, end),), tuple(slot.ranges(begin, end))))
            continue
        if whole and slot.offset + slot.bytes - slots[whole[0].slot].offset > chunk_bytes:
            close()
        whole.append(Piece(index, 0, slot.count))
    close()
    return chunks


class Arena(abc.ABC):
    """Memory for slots on one device, cut into the chunks in which a step visits it."""

    mode: str
    reason = ""  # of the mode, where it was chosen
    device = torch.device("cpu")
    chunk_bytes = CHUNK_BYTES

    def __init__(self, size: int) -> None:
        self.bytes = size

    @abc.abstractmethod
    def tensor(self, part: Range, dtype: torch.dtype) -> Tensor:
        """[bytes / itemsize] of dtype, with a storage of its own, so that it is saved without its neighbours."""

    def tensors(self, slot: Slot) -> Tensors:
        """All of a slot: exp_avg, exp_avg_sq and, in 8 bits, absmax."""
        return tuple(map(self.tensor, slot.whole, slot.dtypes))

    def plan(self, slots: Sequence[Slot]) -> None:
        """Cut the arena into chunks."""
        self.chunks = cut(slots, self.chunk_bytes)
        self.held = [[self._part(slots[piece.slot], piece) for piece in chunk.pieces] for chunk in self.chunks]

    def _part(self, slot: Slot, piece: Piece) -> Tensors:
        return tuple(map(self.tensor, slot.ranges(piece.begin, piece.end), slot.dtypes))

    def visits(self, chunks: list[int]) -> list[list[int]]:
        """Begins a step over these chunks: which of them to acquire together."""
        return [[chunk] for chunk in chunks]

    @abc.abstractmethod
    def acquire(self, chunks: list[int], following: int) -> None:
        """What these chunks hold is close by until they are released; begins to bring the one that follows."""

    @abc.abstractmethod
    def release(self, chunks: list[int]) -> None:
        """What was acquired is updated."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Until the arena itself holds what was updated; what is written there then is brought anew."""

    @abc.abstractmethod
    def evict(self) -> int:
        """Move everything away from where it is used; returns the bytes freed there."""

    @abc.abstractmethod
    def stats(self) -> dict[str, int]:
        """Bytes close to where they are used (resident), elsewhere (paged), and most that were seen close (peak)."""


class Ram(Arena):
    """An arena in the process's own memory."""

    mode = "ram"
    chunk_bytes = 1 << 62  # one chunk: nothing is brought

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.peak = 0
        self.memory = self._map(size + HUGE_PAGE)
        self.start = -ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) % HUGE_PAGE

    def _map(self, size: int) -> mmap.mmap:
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError(
                f"PagedAdamW: the state must fit into RAM, got {size >> 20} MiB of it and: {error}; page_to=<folder> "
                "keeps it in a file, bits=8 makes it four times smaller"
            ) from error
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def tensor(self, part: Range, dtype: torch.dtype) -> Tensor:
        offset, size = part
        if not size:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=size // dtype.itemsize, offset=self.start + offset)

    def acquire(self, chunks: list[int], following: int) -> None:
        """Nothing: all is close by."""

    def release(self, chunks: list[int]) -> None:
        """Nothing: the arena itself was updated."""

    def wait(self) -> None:
        """Nothing, for the same reason."""

    def evict(self) -> int:
        return 0  # there is no elsewhere

    def stats(self) -> dict[str, int]:
        resident = self.resident()
        self.peak = max(self.peak, resident)
        return {"resident": resident, "paged": self.bytes - resident, "peak": self.peak}

    def resident(self) -> int:
        """Bytes that are in RAM, by what the system says of the pages."""
        pages = -(-self.bytes // mmap.PAGESIZE)
        found = (ctypes.c_uint8 * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + self.start
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(self.bytes), found):
            return self.bytes  # nobody knows: as if all were here
        here = int((torch.frombuffer(found, dtype=torch.uint8) & 1).sum()) if pages else 0
        return min(self.bytes, here * mmap.PAGESIZE)


class File(Ram):
    """An arena in a file that has no name in its folder, so that it is gone with the process, however that ends."""

    mode = "file"
    chunk_bytes = 8 << 20  # a million values in 32 bits
    ahead = 4  # chunks that are asked for before they are needed: a disk answers late, and many requests at once

    def __init__(self, size: int, folder: str | os.PathLike[str]) -> None:
        self.folder = folder
        super().__init__(size)

    def _map(self, size: int) -> mmap.mmap:
        try:
            file = tempfile.TemporaryFile(dir=self.folder)
        except OSError as error:
            raise type(error)(
                error.errno, f"PagedAdamW: page_to must be a folder to write to, got {self.folder}: {error.strerror}"
            ) from error
        with file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # now, not when a step writes: that would be a bus error
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                    raise
                free = shutil.disk_usage(self.folder).free
                raise OSError(
                    error.errno,
                    f"PagedAdamW: page_to must have room for the state, {size >> 20} MiB, got {free >> 20} MiB free "
                    f"in {self.folder}: {error.strerror}; bits=8 makes it four times smaller",
                ) from error
            self.descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self.descriptor)
            return mmap.mmap(self.descriptor, size)

    def plan(self, slots: Sequence[Slot]) -> None:
        """As many values in 8 bits as in 32: they take as long to update, and the disk works meanwhile."""
        if any(slot.blocks is not None for slot in slots):
            self.chunk_bytes //= 4
        super().plan(slots)

    def _advise(self, chunk: int, advice: int) -> None:
        for offset, size in self.chunks[chunk].ranges:
            first = (self.start + offset) // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):
                self.memory.madvise(advice, first, self.start + offset + size - first)

    def visits(self, chunks: list[int]) -> list[list[int]]:
        self.coming: list[int] = []
        if chunks and self.resident() == self.bytes:
            return [chunks]  # nothing to bring
        self.coming = list(reversed(chunks))
        for _ in range(self.ahead):
            self._ask()
        return super().visits(chunks)

    def acquire(self, chunks: list[int], following: int) -> None:
        self._ask()

    def _ask(self) -> None:
        if self.coming:
            self._advise(self.coming.pop(), mmap.MADV_WILLNEED)

    def evict(self) -> int:
        """Write what has changed and let go of the pages."""
        before = self.resident()
        self.memory.flush()
        self.memory.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return before - self.resident()
