"""Where an optimizer's state lives: one arena per device, in step order, and the chunks in which a step visits it.

Some arenas do not hold all state in the memory where it is updated: a file, unified memory, pinned memory of a card.
Such an arena brings the next chunk while the present one is updated. Offsets and sizes are bytes of the arena.
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
CHUNK_BYTES = 32 << 20  # large enough to hide the call that brings it, small enough for three in a card's free memory


class Arena(abc.ABC):
    """Memory for the state of the parameters on one device, cut into the chunks in which a step visits it."""

    mode: str
    reason = ""  # why the arena has this mode, where paging="auto" chose it
    device = torch.device("cpu")
    chunk_bytes = CHUNK_BYTES

    def __init__(self, size: int) -> None:
        self.bytes = size
        self.chunks: list[Chunk] = []
        self.chunk_tensors: list[list[Tensors]] = []  # by chunk and segment

    @abc.abstractmethod
    def tensor(self, part: Range, dtype: torch.dtype) -> Tensor:
        """The bytes of `part` as a tensor [bytes / itemsize] with its own storage, so that only it is saved."""

    def tensors(self, layout: StateLayout) -> Tensors:
        """All of a parameter's state: exp_avg, exp_avg_sq and, in 8 bits, absmax."""
        return tuple(map(self.tensor, layout.all_ranges, layout.dtypes))

    def cut_into_chunks(self, layouts: Sequence[StateLayout]) -> None:
        """Cut the arena into chunks."""
        self.chunks = cut(layouts, self.chunk_bytes)
        self.chunk_tensors = [
            [self._tensors_of(layouts[segment.param], segment) for segment in chunk.segments] for chunk in self.chunks
        ]

    def _tensors_of(self, layout: StateLayout, segment: Segment) -> Tensors:
        return tuple(map(self.tensor, layout.ranges(segment.begin, segment.end), layout.dtypes))

    def visits(self, chunks: list[int]) -> list[list[int]]:
        """Begin a step over these chunks; returns the groups of chunks to acquire together."""
        return [[chunk] for chunk in chunks]

    @abc.abstractmethod
    def acquire(self, chunks: list[int], following: int) -> None:
        """Make these chunks usable until they are released, and begin to bring the following one."""

    @abc.abstractmethod
    def release(self, chunks: list[int]) -> None:
        """The caller has updated these chunks."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Wait until the arena's memory holds all updates. A step uses what is written there afterwards."""

    @abc.abstractmethod
    def evict(self) -> int:
        """Move all state out of the memory where it is used; returns the bytes freed there."""

    @abc.abstractmethod
    def stats(self) -> dict[str, int]:
        """Bytes in the memory where they are used (resident) and elsewhere (paged); the most resident ones (peak)."""


class RamArena(Arena):
    """An arena in the process's own memory."""

    mode = "ram"
    chunk_bytes = 1 << 62  # everything is one chunk

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
                f"PagedAdamW: the state must fit into RAM, got {size >> 20} MiB of state: {error}; page_to=<folder> "
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
        """Do nothing: all state is in RAM."""

    def release(self, chunks: list[int]) -> None:
        """Do nothing: the step has updated the arena's own memory."""

    def wait(self) -> None:
        """Do nothing, for the same reason."""

    def evict(self) -> int:
        return 0  # there is no other memory to move to

    def stats(self) -> dict[str, int]:
        resident = self.resident()
        self.peak = max(self.peak, resident)
        return {"resident": resident, "paged": self.bytes - resident, "peak": self.peak}

    def resident(self) -> int:
        """Bytes that are in RAM, as mincore() reports the pages."""
        pages = -(-self.bytes // mmap.PAGESIZE)
        flags = (ctypes.c_uint8 * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + self.start
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(self.bytes), flags):
            return self.bytes  # mincore() failed: assume that all are
        resident_pages = int((torch.frombuffer(flags, dtype=torch.uint8) & 1).sum()) if pages else 0
        return min(self.bytes, resident_pages * mmap.PAGESIZE)


class FileArena(RamArena):
    """An arena in a file without a name in its folder, so that the system deletes it however the process ends."""

    mode = "file"
    chunk_bytes = 8 << 20  # a million values in 32 bits
    ahead = 4  # chunks requested before they are needed: a disk has a long latency, and serves many requests at once

    def __init__(self, size: int, folder: str | os.PathLike[str]) -> None:
        self.folder = folder
        self.to_request: list[int] = []  # chunks still to be requested in this step, in reverse order
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
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk fails here; in a step it would be a bus error
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

    def cut_into_chunks(self, layouts: Sequence[StateLayout]) -> None:
        """Cut chunks of as many values in 8 bits as in 32: an update then takes as long, while the disk reads."""
        if any(layout.blocks is not None for layout in layouts):
            self.chunk_bytes //= 4
        super().cut_into_chunks(layouts)

    def _advise(self, chunk: int, advice: int) -> None:
        for offset, size in self.chunks[chunk].ranges:
            first = (self.start + offset) // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):
                self.memory.madvise(advice, first, self.start + offset + size - first)

    def visits(self, chunks: list[int]) -> list[list[int]]:
        self.to_request = []
        if chunks and self.resident() == self.bytes:
            return [chunks]  # all state is in RAM
        self.to_request = list(reversed(chunks))
        for _ in range(self.ahead):
            self._request_next()
        return super().visits(chunks)

    def acquire(self, chunks: list[int], following: int) -> None:
        self._request_next()

    def _request_next(self) -> None:
        if self.to_request:
            self._advise(self.to_request.pop(), mmap.MADV_WILLNEED)

    def evict(self) -> int:
        """Write changed pages to the file and release all pages."""
        before = self.resident()
        self.memory.flush()
        self.memory.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return before - self.resident()
