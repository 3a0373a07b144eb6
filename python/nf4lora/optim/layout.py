"""How an optimizer's state lies in its arena: a layout for each parameter, cut into chunks that a step visits.

Offsets and sizes are bytes of the arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nf4lora import _C

ALIGNMENT = 128  # of each tensor: a cache line of the GPU, two of the CPU
SEGMENT = 4096  # values; a tensor is cut at multiples of it, so that blocks of 8-bit moments and pages stay whole

Range = tuple[int, int]  # offset, bytes
Tensors = tuple[Tensor, ...]  # exp_avg, exp_avg_sq and, in 8 bits, absmax


@dataclass(frozen=True)
class StateLayout:
    """The state of one parameter in the arena: exp_avg, then exp_avg_sq, then, in 8 bits, absmax [blocks, 2]."""

    offset: int
    count: int  # values
    blocks: int | None  # rows of absmax, one per 256 values; None in 32 bits

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of exp_avg, exp_avg_sq and, in 8 bits, absmax."""
        if self.blocks is None:
            return torch.float32, torch.float32
        return torch.uint8, torch.uint8, torch.float32

    def ranges(self, begin: int, end: int) -> list[Range]:
        """The ranges of values [begin, end) in exp_avg, exp_avg_sq and, in 8 bits, absmax; a block starts at begin."""
        size, block = self.dtypes[0].itemsize, _C.MOMENT_BLOCKSIZE
        second = self.offset + _aligned(self.count * size)
        ranges = [(start + begin * size, (end - begin) * size) for start in (self.offset, second)]
        if self.blocks is not None:
            first, last = begin // block, -(-end // block)
            ranges.append((second + _aligned(self.count) + 8 * first, 8 * (last - first)))
        return ranges

    @property
    def all_ranges(self) -> list[Range]:
        """The ranges of all values, with the rows of absmax that a shard may have beyond its blocks."""
        *moments, last = self.ranges(0, self.count)
        return [*moments, last if self.blocks is None else (last[0], 8 * self.blocks)]

    @property
    def bytes(self) -> int:
        start, size = self.all_ranges[-1]
        return _aligned(start + size - self.offset)


@dataclass(frozen=True)
class Segment:
    """Values [begin, end) of a parameter's state."""

    param: int  # its number in the arena
    begin: int
    end: int


@dataclass(frozen=True)
class Chunk:
    """Segments that are visited together; `ranges` covers them."""

    segments: tuple[Segment, ...]
    ranges: tuple[Range, ...]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def lay_out(counts: Sequence[tuple[int, int | None]]) -> tuple[list[StateLayout], int]:
    """Layouts of parameters, given as (values, blocks), in this order, and their bytes in all."""
    layouts, offset = [], 0
    for count, blocks in counts:
        layouts.append(StateLayout(offset, count, blocks))
        offset += layouts[-1].bytes
    return layouts, offset


def cut(layouts: Sequence[StateLayout], chunk_bytes: int) -> list[Chunk]:
    """Chunks of at most chunk_bytes, or of one segment of SEGMENT values where that is more."""
    chunks: list[Chunk] = []
    uncut: list[Segment] = []

    def close() -> None:
        if uncut:
            start = layouts[uncut[0].param].offset
            last = layouts[uncut[-1].param]
            chunks.append(Chunk(tuple(uncut), ((start, last.offset + last.bytes - start),)))
            uncut.clear()

    for index, layout in enumerate(layouts):
        if layout.bytes > chunk_bytes and layout.count > SEGMENT:
            close()
            values = max(1, chunk_bytes * layout.count // layout.bytes // SEGMENT) * SEGMENT
            for begin in range(0, layout.count, values):
                end = min(begin + values, layout.count)
                chunks.append(Chunk((Segment(index, begin, end),), tuple(layout.ranges(begin, end))))
            continue
        if uncut and layout.offset + layout.bytes - layouts[uncut[0].param].offset > chunk_bytes:
            close()
        uncut.append(Segment(index, 0, layout.count))
    close()
    return chunks
