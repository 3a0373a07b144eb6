"""Parameters whose state was placed together in one arena, and their part in a step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nf4lora import ops
from nf4lora.moments import ZEROS, Moments
from nf4lora.paged import Arena, File, Ram, Tensors, lay_out
from nf4lora.shards import absmax_blocks, as_shard, local, mark
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


@dataclass
class Work:
    """A region's part in a step, one entry for each parameter that has a gradient."""

    indices: list[int]
    params: list[Tensor]  # this process's shards, contiguous
    grads: list[Tensor]  # contiguous, of the dtype of their parameter
    groups: list[int]  # which numbers are theirs


@dataclass(frozen=True)
class Call:
    """One call of the op: which entries of the work take part, and where their moments are."""

    positions: list[int]
    parts: list[slice] | None  # values of each, where not all are whole
    moments: list[list[Tensor]]  # exp_avgs, exp_avg_sqs, absmaxs


@dataclass(frozen=True)
class Visit:
    """Chunks that are acquired together, and what is called for them."""

    chunks: list[int]
    following: int
    calls: list[Call]


@dataclass
class Place:
    """Where the state of a parameter is."""

    region: Region
    index: int
    shown: dict[str, Tensor]  # what the optimizer shows of it
    address: int = -1  # of the parameter when it was last looked at

    def fits(self, p: Tensor) -> bool:
        mine = local(p)
        return self.region.arena.device == mine.device and self.region.counts[self.index] == mine.numel()


class Region:
    """Some parameters of one device; `states` is what the optimizer shows of each."""

    def __init__(self, params: Sequence[Tensor], bits: int, arena: Arena) -> None:
        self.arena = arena
        self.slots, _ = lay_out(sizes(params, bits))
        self.counts = [slot.count for slot in self.slots]
        self.key: tuple[list, ...] | None = None  # of the schedules
        arena.plan(self.slots)
        self.steps = torch.zeros(len(params))  # one tensor: all of them count in one operation
        self.marks = [mark(p) for p in params] if bits == 8 else [None] * len(params)
        self.states: list[dict[str, Tensor]] = []
        for p, slot, step in zip(params, self.slots, self.steps, strict=True):
            first, second, *absmax = arena.tensors(slot)
            shape = local(p).shape
            shown = [as_shard(first.view(shape), p), as_shard(second.view(shape), p)]
            shown += [as_shard(each.view(-1, 2), p, by_rows=True) for each in absmax]
            self.states.append({"step": step, **dict(zip(NAMES, shown))})

    def fill(self, index: int, moments: Moments | None) -> None:
        """Set one parameter's state: to these moments, or to that of no step taken."""
        self.arena.wait()
        slot = self.slots[index]
        first, second, *absmax = self.arena.tensors(slot)
        self.steps[index] = moments.step if moments else 0.0
        blocks = 0
        if moments is None:
            for each, zero in zip((first, second), ZEROS):
                each.fill_(zero if absmax else 0.0)
        else:
            first.copy_(moments.exp_avg)  # which may be this very memory: a state that is loaded where it was saved
            second.copy_(moments.exp_avg_sq)
        for each in absmax:
            rows = each.view(-1, 2)
            if moments is not None and moments.absmax is not None:
                blocks = len(moments.absmax)
                rows[:blocks] = moments.absmax
            rows[blocks:] = 0.0
            if (last := self.marks[index]) is not None:
                rows[-1] = last

    def step(self, work: Work, numbers: Sequence[tuple[float, ...]], skipped: Tensor, scale: Tensor | None) -> None:
        """Update these parameters, chunk after chunk; numbers of a group: lr, beta1, beta2, eps, weight_decay."""
        counted = self.steps.tolist()
        steps = [counted[i] + 1 for i in work.indices]
        for visit in self._schedule(work, steps):
            self.arena.acquire(visit.chunks, visit.following)
            for call in visit.calls:
                params, grads = ([each[i] for i in call.positions] for each in (work.params, work.grads))
                if call.parts:
                    params, grads = (
                        [t.view(-1)[part] for t, part in zip(each, call.parts)] for each in (params, grads)
                    )
                first = call.positions[0]
                of_group, step = numbers[work.groups[first]], int(steps[first])
                ops.adamw_step_(params, grads, *call.moments, skipped, scale, *of_group, step)  # type: ignore
            self.arena.release(visit.chunks)
        if len(steps) == len(self.slots):
            self.steps.add_(1)
        else:
            self.steps[work.indices] += 1

    def _schedule(self, work: Work, steps: list[float]) -> list[Visit]:
        """What is called for which chunks.

        It stays that of the step before as long as the same parameters take part, and those of one group and one count
        of steps still are.
        """
        key = (work.indices, work.groups, [step - steps[0] for step in steps])
        if key != self.key:
            self.key = key
            self.schedules: dict[int, list[Visit]] = {}
            position = {index: i for i, index in enumerate(work.indices)}
            chunks = enumerate(self.arena.chunks)
            self.order = [i for i, chunk in chunks if any(piece.slot in position for piece in chunk.pieces)]
            self.position = position
        visits = self.arena.visits(self.order)
        found = self.schedules.get(len(visits))  # all in one, or each for itself
        if found is None:
            following = [chunks[0] for chunks in visits[1:] + visits[:1]]
            made = (self._calls(chunks, work.groups, steps) for chunks in visits)
            found = [Visit(*each) for each in zip(visits, following, made)]
            self.schedules[len(visits)] = found
        return found

    def _calls(self, chunks: list[int], groups: list[int], steps: list[float]) -> list[Call]:
        """A call for each group and count of steps among what these chunks hold."""
        calls: dict[tuple[int, float], list[tuple[int, slice, Tensors]]] = {}
        whole = True
        for chunk in chunks:
            for piece, held in zip(self.arena.chunks[chunk].pieces, self.arena.held[chunk], strict=True):
                if (i := self.position.get(piece.slot)) is None:
                    continue
                whole &= piece.end - piece.begin == self.counts[piece.slot]
                calls.setdefault((groups[i], steps[i]), []).append((i, slice(piece.begin, piece.end), held))
        made = []
        for entries in calls.values():
            positions, parts, held_by_each = (list(column) for column in zip(*entries))
            moments = [list(column) for column in zip(*held_by_each)]
            moments += [[]] * (3 - len(moments))  # no absmax in 32 bits
            made.append(Call(positions, None if whole else parts, moments))
        return made


def sizes(params: Sequence[Tensor], bits: int) -> list[tuple[int, int | None]]:
    """Values of each, and in 8 bits the rows of absmax."""
    return [(local(p).numel(), absmax_blocks(p) if bits == 8 else None) for p in params]
