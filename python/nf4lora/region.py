"""Parameters whose state was placed together in one arena, and their part in a step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nf4lora import ops
from nf4lora.moments import ZEROS, Moments
from nf4lora.paged import Arena, File, Ram, lay_out
from nf4lora.shards import absmax_blocks, as_shard, local
from nf4lora.unified import Unified

PAGING = "auto", "managed", "streamed"  # of Unified
NAMES = "exp_avg", "exp_avg_sq", "absmax"


def arena_of(device: torch.device, size: int, page_to: str | os.PathLike[str] | None, paging: str) -> Arena:
    """An arena of `size` bytes for parameters of this device."""
    if device.type == "cpu":
        return Ram(size) if page_to is None else File(size, page_to)
    if device.type != "cuda":
        raise ValueError(f"PagedAdamW: every parameter must be on the CPU or on CUDA, got one on {device}")
    if page_to is not None:
        raise ValueError(f"PagedAdamW: page_to must be None for parameters on CUDA, got {page_to}; paging moves them")
    return Unified(device, size, paging)


@dataclass(frozen=True)
class Update:
    """One parameter's part in a step: this process's shard, its gradient in the same order and dtype."""

    param: Tensor
    grad: Tensor
    numbers: tuple[float, ...]  # lr, beta1, beta2, eps, weight_decay


class Region:
    """Some parameters of one device; `states` is what the optimizer shows of each."""

    def __init__(self, params: Sequence[Tensor], bits: int, arena: Arena) -> None:
        self.arena = arena
        self.slots, _ = lay_out(sizes(params, bits))
        self.counts = [slot.count for slot in self.slots]
        arena.plan(self.slots)
        self.steps = torch.zeros(len(params))  # one tensor: all of them count in one operation
        self.states: list[dict[str, Tensor]] = []
        for p, slot, step in zip(params, self.slots, self.steps, strict=True):
            first, second, *absmax = arena.tensors(slot, 0, slot.count)
            shape = local(p).shape
            shown = [as_shard(first.view(shape), p), as_shard(second.view(shape), p)]
            shown += [as_shard(each.view(-1, 2), p, by_rows=True) for each in absmax]
            self.states.append({"step": step, **dict(zip(NAMES, shown))})

    def fill(self, index: int, moments: Moments | None) -> None:
        """Set one parameter's state: to these moments, or to that of no step taken."""
        self.arena.wait()
        slot = self.slots[index]
        first, second, *absmax = self.arena.tensors(slot, 0, slot.count)
        self.steps[index] = moments.step if moments else 0.0
        if moments is None:
            for each, zero in zip((first, second), ZEROS):
                each.fill_(zero if absmax else 0.0)
            for each in absmax:
                each.zero_()
            return
        first.copy_(moments.exp_avg)  # which may be this very memory: a state that is loaded where it was saved
        second.copy_(moments.exp_avg_sq)
        if moments.absmax is not None:
            rows = absmax[0].view(-1, 2)
            rows[: len(moments.absmax)] = moments.absmax
            rows[len(moments.absmax) :] = 0.0

    def step(self, updates: dict[int, Update], skipped: Tensor, scale: Tensor | None) -> None:
        """Update the parameters of these indices, chunk after chunk."""
        arena = self.arena
        contiguous = {i: each.param.contiguous() for i, each in updates.items()}
        if len(updates) == len(self.slots):
            self.steps.add_(1)
        else:
            self.steps[list(updates)] += 1
        steps = self.steps.tolist()
        order = [i for i, chunk in enumerate(arena.chunks) if any(piece.slot in updates for piece in chunk.pieces)]
        visits = arena.visits(order)
        for chunks, then in zip(visits, visits[1:] + visits[:1]):
            arena.acquire(chunks, then[0])
            calls: dict[tuple, tuple[list[Tensor], ...]] = {}
            for chunk in chunks:
                for piece, held in zip(arena.chunks[chunk].pieces, arena.held[chunk], strict=True):
                    if piece.slot not in updates:
                        continue
                    update, param = updates[piece.slot], contiguous[piece.slot]
                    grad = update.grad
                    if piece.end - piece.begin != param.numel():
                        param, grad = (each.view(-1)[piece.begin : piece.end] for each in (param, grad))
                    lists = calls.setdefault((*update.numbers, int(steps[piece.slot])), ([], [], [], [], []))
                    for one, tensor in zip(lists, (param, grad, *held)):
                        one.append(tensor)
            for numbers, lists in calls.items():
                ops.adamw_step_(*lists, skipped, scale, *numbers)  # type: ignore[arg-type, call-arg]
            arena.release(chunks)
        for i, each in updates.items():
            if contiguous[i] is not each.param:
                each.param.copy_(contiguous[i])


def sizes(params: Sequence[Tensor], bits: int) -> list[tuple[int, int | None]]:
    """Values of each, and in 8 bits the rows of absmax."""
    return [(local(p).numel(), absmax_blocks(p) if bits == 8 else None) for p in params]
