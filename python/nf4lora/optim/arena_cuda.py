"""The arenas of an optimizer on CUDA: csrc/cuda/paged.h decides what is on the card, this file makes tensors of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nf4lora import _C
from nf4lora.optim.arena import Arena
from nf4lora.optim.layout import Range, StateLayout

PAGING = "auto", "managed", "streamed"


class Card:
    """The functions of CUDA that an arena uses. Tests replace it by a fake card."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pager(self, size: int, paging: str) -> _C.Pager:
        if not _C.CUDA_VERSION:
            raise RuntimeError(
                "PagedAdamW: parameters on CUDA need a build of nf4lora with CUDA, got one for the CPU only; put nvcc "
                "on PATH and reinstall: pip install --force-reinstall --no-deps --no-cache-dir ."
            )
        return _C.Pager(self.device.index, size, paging)

    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def bytes_at(self, address: int, size: int, owner: Any) -> Tensor:
        """A tensor [size] uint8 at an address of the card; the tensor keeps `owner` alive."""
        return torch.as_tensor(_Bytes(address, size, owner), device=self.device)


def cuda_arena(card: Card, size: int, paging: str) -> ManagedArena | StreamedArena:
    """An arena of `size` bytes for parameters on a card; with paging="auto" its kind depends on the card's driver."""
    pager = card.pager(size, paging)
    return (ManagedArena if pager.mode == "managed" else StreamedArena)(card, pager, size)


class CudaArena(Arena):
    """The common part of arenas in unified and in pinned memory: a pager moves the chunks."""

    def __init__(self, card: Card, pager: _C.Pager, size: int) -> None:
        super().__init__(size)
        self.card, self.pager, self.device = card, pager, card.device
        self.mode, self.reason = pager.mode, pager.reason

    def cut_into_chunks(self, layouts: Sequence[StateLayout]) -> None:
        super().cut_into_chunks(layouts)
        self.pager.plan([chunk.ranges for chunk in self.chunks])

    def visits(self, chunks: list[int]) -> list[list[int]]:
        return [chunks] if self.pager.begin() else super().visits(chunks)

    def acquire(self, chunks: list[int], following: int) -> None:
        self.pager.acquire(chunks, following, self.card.stream())

    def release(self, chunks: list[int]) -> None:
        self.pager.release(chunks, self.card.stream())

    def wait(self) -> None:
        self.pager.wait()

    def evict(self) -> int:
        return self.pager.evict()

    def stats(self) -> dict[str, int]:
        residency = self.pager.residency()
        resident = residency["resident"]
        return {"resident": resident, "paged": self.bytes - resident, "peak": residency["peak"]}

    def _on_card(self, address: int, size: int, dtype: torch.dtype) -> Tensor:
        """A tensor on the card over these bytes."""
        if not size:
            return torch.empty(0, dtype=dtype, device=self.device)
        tensor = self.card.bytes_at(address, size, self.pager)
        if tensor.data_ptr() != address:  # torch has made a copy, which no step would update
            raise RuntimeError(
                f"PagedAdamW: a tensor over the state on {self.device} must lie where the state does, got a copy on "
                f"{tensor.device}"
            )
        return tensor.view(dtype)


class ManagedArena(CudaArena):
    """Unified memory: its tensors belong to the card's device, and their pages lie on the card or in host memory."""

    def tensor(self, part: Range, dtype: torch.dtype) -> Tensor:
        offset, size = part
        return self._on_card(self.pager.address + offset, size, dtype)


class StreamedArena(CudaArena):
    """Pinned host memory, whose chunks are copied into staging buffers of the card for a step and back.

    The tensors of the arena are on the CPU; the tensors of a chunk are the staging buffers.
    """

    def tensor(self, part: Range, dtype: torch.dtype) -> Tensor:
        offset, size = part
        if not size:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.pager, dtype=dtype, count=size // dtype.itemsize, offset=offset)

    def cut_into_chunks(self, layouts: Sequence[StateLayout]) -> None:
        super().cut_into_chunks(layouts)
        for i, chunk in enumerate(self.chunks):
            buffers = list(zip(chunk.ranges, self.pager.addresses(i), strict=True))
            for j, segment in enumerate(chunk.segments):
                layout = layouts[segment.param]
                self.chunk_tensors[i][j] = tuple(
                    self._on_card(_staged(part, buffers), part[1], dtype)
                    for part, dtype in zip(layout.ranges(segment.begin, segment.end), layout.dtypes)
                )


class _Bytes:
    """Memory described by CUDA's array interface. torch keeps this object alive, and this object its owner."""

    def __init__(self, address: int, size: int, owner: Any) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _staged(part: Range, buffers: Sequence[tuple[Range, int]]) -> int:
    """The address of a part of the arena in the staging buffers, which hold these ranges of the arena."""
    begin, end = part[0], sum(part)
    return next(to + begin - start for (start, size), to in buffers if start <= begin and end <= start + size)
