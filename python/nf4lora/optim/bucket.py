"""A bucket: the parameters of one device whose state lies in one arena, and how a step updates them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nf4lora import ops
from nf4lora.optim.arena import Arena, FileArena, RamArena
from nf4lora.optim.arena_cuda import Card, cuda_arena
from nf4lora.optim.dtensor import absmax_blocks, as_shard, local, shard_size_tag
from nf4lora.optim.layout import Tensors, lay_out
from nf4lora.optim.quantized import ZEROS, Moments

STATE = "exp_avg", "exp_avg_sq", "absmax"


def arena_of(device: torch.device, size: int, page_to: str | os.PathLike[str] | None, paging: str) -> Arena:
    """An arena of `size` bytes for parameters of this device."""
    if device.type == "cpu":
        return RamArena(size) if page_to is None else FileArena(size, page_to)
    if device.type != "cuda":
        raise ValueError(f"PagedAdamW: every parameter must be on the CPU or on CUDA, got one on {device}")
    if page_to is not None:
        raise ValueError(f"PagedAdamW: page_to must be None for parameters on CUDA, got {page_to}; paging moves them")
    return cuda_arena(Card(device), size, paging)


@dataclass
class ParamState:
    """Where the state of a parameter is, and the tensors of it that the optimizer exposes."""

    bucket: Bucket
    index: int  # of the parameter in the bucket
    exposed: dict[str, Tensor]
    address: int = -1  # of the parameter at the last step

    def fits(self, p: Tensor) -> bool:
        shard = local(p)
        return self.bucket.arena.device == shard.device and self.bucket.counts[self.index] == shard.numel()


@dataclass
class BucketGradients:
    """The gradients of a bucket in one step, with one entry for each parameter that has one."""

    indices: list[int] = field(default_factory=list)  # of the parameters in the bucket
    params: list[Tensor] = field(default_factory=list)  # this process's shards, contiguous
    grads: list[Tensor] = field(default_factory=list)  # contiguous, of the dtype of their parameter
    groups: list[int] = field(default_factory=list)  # the optimizer's parameter group, for its hyperparameters

    def add(self, index: int, param: Tensor, grad: Tensor, group: int) -> None:
        self.indices.append(index)
        self.params.append(param)
        self.grads.append(grad)
        self.groups.append(group)


@dataclass(frozen=True)
class Launch:
    """One call of the op: which entries of BucketGradients take part, and their moments."""

    entries: list[int]
    parts: list[slice] | None  # the values of each parameter; None: all values of all of them
    moments: list[list[Tensor]]  # exp_avgs, exp_avg_sqs, absmaxs


@dataclass(frozen=True)
class Visit:
    """Chunks that are acquired together, the chunk to bring meanwhile, and the launches that update them."""

    chunks: list[int]
    following: int
    launches: list[Launch]


LaunchPlan = list[Visit]


class Bucket:
    """Parameters of one device; `states` are the tensors that the optimizer exposes of each."""

    def __init__(self, params: Sequence[Tensor], bits: int, arena: Arena) -> None:
        self.arena = arena
        self.layouts, _ = lay_out(state_sizes(params, bits))
        self.counts = [layout.count for layout in self.layouts]
        arena.cut_into_chunks(self.layouts)
        self.steps = torch.zeros(len(params))  # one tensor, so that one operation counts all of them
        self.shard_size_tags = [shard_size_tag(p) for p in params] if bits == 8 else [None] * len(params)
        self.states = [
            {"step": step, **self._exposed(p, arena.tensors(layout))}
            for p, layout, step in zip(params, self.layouts, self.steps, strict=True)
        ]
        self._planned_for: tuple[list, ...] | None = None
        self._order: list[int] = []  # chunks with a parameter that takes part in the step
        self._plans: dict[int, LaunchPlan] = {}  # by the number of visits

    def _exposed(self, p: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        first, second, *absmax = tensors
        shape = local(p).shape
        exposed = [as_shard(first.view(shape), p), as_shard(second.view(shape), p)]
        exposed += [as_shard(tensor.view(-1, 2), p, by_rows=True) for tensor in absmax]
        return dict(zip(STATE, exposed))

    def fill(self, index: int, moments: Moments | None) -> None:
        """Set one parameter's state to these moments; None: to the state before any step."""
        self.arena.wait()
        first, second, *absmax = self.arena.tensors(self.layouts[index])
        self.steps[index] = moments.step if moments else 0.0
        blocks = 0
        if moments is None:
            for tensor, zero in zip((first, second), ZEROS):
                tensor.fill_(zero if absmax else 0.0)
        else:
            # Source and target may be the same memory, where a state is loaded into the optimizer that saved it.
            first.copy_(moments.exp_avg)
            second.copy_(moments.exp_avg_sq)
        for scales in absmax:
            rows = scales.view(-1, 2)
            if moments is not None and moments.absmax is not None:
                blocks = len(moments.absmax)
                rows[:blocks] = moments.absmax
            rows[blocks:] = 0.0
            if (tag := self.shard_size_tags[index]) is not None:
                rows[-1] = tag

    def step(
        self,
        gradients: BucketGradients,
        hyperparameters: Sequence[tuple[float, ...]],
        skipped: Tensor,
        scale: Tensor | None,
    ) -> None:
        """Update the parameters that have a gradient, one chunk after the other.

        Args:
            hyperparameters: lr, beta1, beta2, eps, weight_decay of each group
            skipped, scale: as in ops.adamw_step_
        """
        taken = self.steps.tolist()
        steps = [taken[i] + 1 for i in gradients.indices]
        for visit in self._plan(gradients, steps):
            self.arena.acquire(visit.chunks, visit.following)
            for launch in visit.launches:
                params = [gradients.params[i] for i in launch.entries]
                grads = [gradients.grads[i] for i in launch.entries]
                if launch.parts:
                    params = [p.view(-1)[part] for p, part in zip(params, launch.parts)]
                    grads = [grad.view(-1)[part] for grad, part in zip(grads, launch.parts)]
                first = launch.entries[0]
                of_group, step = hyperparameters[gradients.groups[first]], int(steps[first])
                ops.adamw_step_(params, grads, *launch.moments, skipped, scale, *of_group, step)  # type: ignore
            self.arena.release(visit.chunks)
        if len(steps) == len(self.layouts):
            self.steps.add_(1)
        else:
            self.steps[gradients.indices] += 1

    def _plan(self, gradients: BucketGradients, steps: list[float]) -> LaunchPlan:
        """The launches of a step, by visit.

        The plan of the step before is used again if the same parameters take part, in the same groups and with the same
        differences between their counts of steps.
        """
        planned_for = (gradients.indices, gradients.groups, [step - steps[0] for step in steps])
        if planned_for != self._planned_for:
            taking_part, chunks = set(gradients.indices), enumerate(self.arena.chunks)
            self._order = [i for i, chunk in chunks if any(segment.param in taking_part for segment in chunk.segments)]
            self._planned_for, self._plans = planned_for, {}
        visits = self.arena.visits(self._order)
        if len(visits) not in self._plans:  # all chunks together, or each by itself
            self._plans[len(visits)] = list(launch_plan(self.arena, self.counts, gradients, steps, visits))
        return self._plans[len(visits)]


def launch_plan(
    arena: Arena, counts: list[int], gradients: BucketGradients, steps: list[float], visits: list[list[int]]
) -> Iterator[Visit]:
    """The visits of a step, with one launch for each group and count of steps among the parameters of its chunks."""
    entries = {index: i for i, index in enumerate(gradients.indices)}
    for chunks, (following, *_) in zip(visits, visits[1:] + visits[:1]):
        launches: dict[tuple[int, float], list[tuple[int, slice, Tensors]]] = {}
        uncut = True
        for chunk in chunks:
            for segment, tensors in zip(arena.chunks[chunk].segments, arena.chunk_tensors[chunk], strict=True):
                if (i := entries.get(segment.param)) is None:
                    continue
                uncut &= segment.end - segment.begin == counts[segment.param]
                part = slice(segment.begin, segment.end)
                launches.setdefault((gradients.groups[i], steps[i]), []).append((i, part, tensors))
        yield Visit(chunks, following, [_launch(segments, uncut) for segments in launches.values()])


def _launch(segments: list[tuple[int, slice, Tensors]], uncut: bool) -> Launch:
    positions, parts, tensors = (list(column) for column in zip(*segments))
    moments = [list(column) for column in zip(*tensors)]
    moments += [[]] * (3 - len(moments))  # no absmax in 32 bits
    return Launch(positions, None if uncut else parts, moments)


def state_sizes(params: Sequence[Tensor], bits: int) -> list[tuple[int, int | None]]:
    """The number of values of each parameter, and in 8 bits of its rows of absmax."""
    return [(local(p).numel(), absmax_blocks(p) if bits == 8 else None) for p in params]
