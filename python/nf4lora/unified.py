"""The arena of an optimizer on CUDA: csrc/cuda/paged.h decides what lies on the card, this shows it as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nf4lora import _C
from nf4lora.paged import Arena, Range, Slot


class Unified(Arena):
    """Unified memory, or pinned memory that is streamed through the card.

    Its tensors are the card's in the first case, the CPU's in the second.
    """

    def __init__(self, device: torch.device, size: int, paging: str) -> None:
        super().__init__(size)
        self.device = device
        self.pager = self._pager(device.index, size, paging)
        self.mode, self.reason = self.pager.mode, self.pager.reason

    # Tests put a fake card beneath these three.

    def _pager(self, device: int, size: int, paging: str) -> _C.Pager:
        if not _C.CUDA_VERSION:
            raise RuntimeError(
                "PagedAdamW: parameters on CUDA need a build of nf4lora with CUDA, got one for the CPU only; put nvcc "
                "on PATH and reinstall: pip install --force-reinstall --no-deps --no-cache-dir ."
            )
        return _C.Pager(device, size, paging)

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def _on_card(self, address: int, size: int) -> Tensor:
        """[size] uint8 at an address of the card, which keeps the pager alive."""
        return torch.as_tensor(_Bytes(address, size, self.pager), device=self.device)

    def tensor(self, part: Range, dtype: torch.dtype) -> Tensor:
        offset, size = part
        if self.mode == "managed":
            return self._at(self.pager.address + offset, size, dtype)
        if not size:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.pager, dtype=dtype, count=size // dtype.itemsize, offset=offset)

    def _at(self, address: int, size: int, dtype: torch.dtype) -> Tensor:
        if not size:
            return torch.empty(0, dtype=dtype, device=self.device)
        found = self._on_card(address, size)
        if found.data_ptr() != address:  # a copy, which no step would reach
            raise RuntimeError(
                f"PagedAdamW: a tensor over the state on {self.device} must lie where the state does, got a copy on "
                f"{found.device}"
            )
        return found.view(dtype)

    def plan(self, slots: Sequence[Slot]) -> None:
        super().plan(slots)
        self.pager.plan([chunk.ranges for chunk in self.chunks])
        if self.mode == "managed":
            return
        for i, chunk in enumerate(self.chunks):
            places = list(zip(chunk.ranges, self.pager.addresses(i), strict=True))
            for j, piece in enumerate(chunk.pieces):
                slot = slots[piece.slot]
                parts = slot.ranges(piece.begin, piece.end)
                self.held[i][j] = tuple(
                    self._at(_staged(part, places), part[1], dtype) for part, dtype in zip(parts, slot.dtypes)
                )

    def visits(self, chunks: list[int]) -> list[list[int]]:
        return [chunks] if self.pager.begin() else super().visits(chunks)

    def acquire(self, chunks: list[int], following: int) -> None:
        self.pager.acquire(chunks, following, self._stream())

    def release(self, chunks: list[int]) -> None:
        self.pager.release(chunks, self._stream())

    def wait(self) -> None:
        self.pager.wait()

    def evict(self) -> int:
        return self.pager.evict()

    def stats(self) -> dict[str, int]:
        found = self.pager.residency()
        return {"resident": found["resident"], "paged": self.bytes - found["resident"], "peak": found["peak"]}


class _Bytes:
    """Memory as CUDA's array interface describes it; torch keeps this object, and so its owner."""

    def __init__(self, address: int, size: int, owner: Any) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _staged(part: Range, places: Sequence[tuple[Range, int]]) -> int:
    """The address of a part of the arena, of which some ranges lie elsewhere."""
    begin, end = part[0], sum(part)
    return next(to + begin - start for (start, size), to in places if start <= begin and end <= start + size)
