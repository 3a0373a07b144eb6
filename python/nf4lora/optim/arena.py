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

import torch
from torch import Tensor

from nf4lora.optim.layout import Chunk, Range, Segment, StateLayout, Tensors, cut

HUGE_PAGE = 2 << 20
CHUNK_BYTES = 32 << 20  # long enough to hide the call that brings it, short enough for three in a card's free memory


class Arena(abc.ABC):
    """Memory for the state of parameters on one device, cut into the chunks in which a step visits it."""

    mode: str
    reason = ""  # of the mode, where it was chosen
    device = torch.device("cpu")
    chunk_bytes = CHUNK_BYTES

    def __init__(self, size: int) -> None:
        self.bytes = size
        self.chunks: list[Chunk] = []
        self.chunk_tensors: list[list[Tensors]] = []  # of each segment of each chunk

    @abc.abstractmethod
    def tensor(self, part: Range, dtype: torch.dtype) -> Tensor:
        """[bytes / itemsize] of dtype, with a storage of its own, so that it is saved without its neighbours."""

    def tensors(self, layout: StateLayout) -> Tensors:
        """All of a parameter's state: exp_avg, exp_avg_sq and, in 8 bits, absmax."""
        return tuple(map(self.tensor, layout.whole, layout.dtypes))

    def plan(self, layouts: Sequence[StateLayout]) -> None:
        """Cut the arena into chunks."""
        self.chunks = cut(layouts, self.chunk_bytes)
        self.chunk_tensors = [
            [self._tensors_of(layouts[segment.param], segment) for segment in chunk.segments] for chunk in self.chunks
        ]

    def _tensors_of(self, layout: StateLayout, segment: Segment) -> Tensors:
        return tuple(map(self.tensor, layout.ranges(segment.begin, segment.end), layout.dtypes))

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


class RamArena(Arena):
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


class FileArena(RamArena):
    """An arena in a file that has no name in its folder, so that it is gone with the process, however that ends."""

    mode = "file"
    chunk_bytes = 8 << 20  # a million values in 32 bits
    ahead = 4  # chunks that are asked for before they are needed: a disk answers late, and many requests at once

    def __init__(self, size: int, folder: str | os.PathLike[str]) -> None:
        self.folder = folder
        self.coming: list[int] = []  # chunks that are still to be asked for in this step, the last first
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

    def plan(self, layouts: Sequence[StateLayout]) -> None:
        """As many values in 8 bits as in 32: they take as long to update, and the disk works meanwhile."""
        if any(layout.blocks is not None for layout in layouts):
            self.chunk_bytes //= 4
        super().plan(layouts)

    def _advise(self, chunk: int, advice: int) -> None:
        for offset, size in self.chunks[chunk].ranges:
            first = (self.start + offset) // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):
                self.memory.madvise(advice, first, self.start + offset + size - first)

    def visits(self, chunks: list[int]) -> list[list[int]]:
        self.coming = []
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
