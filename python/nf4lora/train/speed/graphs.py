"""CUDA graphs of decoder blocks: the launches of a block's forward and of its backward pass, each replayed as one.

The first training batch runs as it is, and each block notes what it is called with. Before the second batch all blocks
are captured, in the order in which torch.cuda.make_graphed_callables does it, because their graphs share memory: the
forward passes first to last, then the backward passes last to first. From then on a block that is called with tensors
of the same shapes replays its graphs; every other call, without gradients say, runs as it is.

Three things differ from make_graphed_callables. A block is called with keywords. It reads the output of the block
before it where that stands, without a copy, and a mask that all blocks share is copied once. And the gradients of its
parameters are added up inside the backward graph, in memory that belongs to it: autograd would take the tensor that the
graph writes into for `.grad` as it is, and the next batch's replay would overwrite it before it is added.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nf4lora.compat.torch import version_of
from nf4lora.nn.model_tree import unchanged_random_state
from nf4lora.train.errors import RunError, reason
from nf4lora.train.speed.calls import (
    Call,
    Memory,
    autocast_of,
    kind_of,
    memory_of,
    put_together,
    replaced,
    take_apart,
)
from nf4lora.train.speed.recorder import CudaRecorder, Recorder

WARM_UPS = 2  # runs before a capture, in which libraries make what they make once


def missing(kind: str) -> str:
    """What graphs need that is not here, as a sentence; nothing where all is there."""
    return "" if kind == "cuda" else "CUDA graphs need an NVIDIA GPU, and this run is on the CPU; use cuda_graphs false"


class BlockGraphs:
    """The graphs of a model's decoder blocks. The blocks keep their parameters, and their forward until they are
    captured; `remove` gives it back.

    Args:
        blocks: by name, in the order in which the model calls them
        recorder: how they are captured; default: as CUDA graphs

    Attributes:
        captured: how many blocks are replayed
        others: training calls of captured blocks that were not replayed, because their arguments were others
    """

    def __init__(self, blocks: dict[str, nn.Module], recorder: Callable[[], Recorder] | None = None) -> None:
        self.recorder = recorder or CudaRecorder
        self.recording = self.replaying = False
        self.captured = self.others = 0
        self.blocks = [_Block(self, name, module) for name, module in blocks.items()]
        self.calls: list[tuple[_Block, Call]] | None = None  # of the first batch, until they are captured

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around the forward pass of a training batch: the first is noted, from the second on blocks are replayed.

        Raises:
            RunError: a block cannot be captured.
        """
        if self.calls is None:
            self.calls, self.recording = [], True
        elif self.calls:
            self.capture(self.calls)
            self.calls = []
        self.replaying = self.captured > 0
        try:
            yield
        finally:
            self.recording = self.replaying = False

    def capture(self, calls: list[tuple[_Block, Call]]) -> None:
        names = [block.name for block, _ in calls]
        if len({*names}) < len(names):
            raise RunError(
                f"cuda_graphs: a block must be called once a batch, {max(names, key=names.count)} is called several "
                "times; use cuda_graphs false"
            )
        device = calls[0][1].tensors[0].device
        recorder = self.recorder()
        places: dict[Memory, _Place] = {}
        dys: dict[Memory, Tensor] = {}
        with unchanged_random_state([device] if device.type == "cuda" else []):
            for block, call in calls:
                block.capture_forward(call, recorder, places)
            for block, call in reversed(calls):
                block.capture_backward(call, recorder, dys)
        self.captured = len(calls)

    def remove(self) -> None:
        """Give each block its own forward back, and free the graphs."""
        for block in self.blocks:
            if vars(block.module).get("forward") is block:
                del block.module.forward
            vars(block).clear()  # frees its tensors now, and not once the collector has come
        self.blocks, self.captured = [], 0


class _Block:
    """A block whose forward is noted, captured and replayed; it stands in the module's place for `forward`."""

    def __init__(self, graphs: BlockGraphs, name: str, module: nn.Module) -> None:
        self.graphs, self.name, self.module = graphs, name, module
        self.original = module.forward
        self.ready = False
        self.replays = 0
        module.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graphs = self.graphs
        if not (graphs.recording or (graphs.replaying and self.ready)) or not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        form: list[Any] = []
        tensors: list[Tensor] = []
        take_apart((args, kwargs), form, tensors)
        if graphs.recording:
            result = self.original(*args, **kwargs)
            outputs: list[Tensor] = []
            take_apart(result, [], outputs)
            graphs.calls.append((self, Call.noted(args, kwargs, outputs)))  # type: ignore[union-attr]
            return result
        if not self.fits(form, tensors):
            graphs.others += 1
            return self.original(*args, **kwargs)
        with torch.no_grad():
            for place, tensor in zip(self.places, tensors, strict=True):
                place.take(tensor)
        differentiable = [tensor for tensor in tensors if tensor.requires_grad]
        results = _Replay.apply(self, *differentiable, *self.parameters)
        return put_together(self.result_form, iter(results))

    def fits(self, form: list[Any], tensors: list[Tensor]) -> bool:
        """Whether a call is the captured one, but for the values of its tensors."""
        return (
            form == self.form
            and [kind_of(tensor) for tensor in tensors] == self.kinds
            and autocast_of(tensors[0].device.type) == self.autocast
        )

    # ---- capture

    def capture_forward(self, call: Call, recorder: Recorder, places: dict[Memory, _Place]) -> None:
        """Capture the forward pass. `places` are those that blocks read, by the first batch's tensors."""
        self.check(call)
        self.form, self.autocast, self.kinds = call.form, call.autocast, call.kinds
        for tensor, (*_, wants_grad) in zip(call.tensors, call.kinds, strict=True):
            if memory_of(tensor) not in places:
                places[memory_of(tensor)] = _Place(tensor.clone().requires_grad_(wants_grad))
        self.places = [places[memory_of(tensor)] for tensor in call.tensors]
        self.inputs = [place.tensor for place in self.places if place.tensor.requires_grad]
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.result_form: list[Any] = []

        def forward() -> list[Tensor]:
            with torch.enable_grad(), self.computing():
                tensors = iter([place.tensor for place in self.places])
                result = self.original(*replaced(call.args, tensors), **replaced(call.kwargs, tensors))
            outputs: list[Tensor] = []
            self.result_form, self.outputs = [], outputs
            take_apart(result, self.result_form, outputs)
            return self.outputs

        def both() -> None:
            forward()
            wanted = [output for output in self.outputs if output.requires_grad]
            torch.autograd.grad(wanted, self.wanted, [torch.zeros_like(output) for output in wanted], allow_unused=True)

        with self.failures():
            for _ in range(WARM_UPS):
                recorder.warm_up(both)
            static, self.replay_forward = recorder.record(forward)
        self.results = [output.detach() for output in static]
        for noted, output in zip(call.outputs, static, strict=True):  # the next block reads it where it stands
            places[memory_of(noted)] = _Place(output.detach().requires_grad_(output.requires_grad))

    def capture_backward(self, call: Call, recorder: Recorder, dys: dict[Memory, Tensor]) -> None:
        """Capture the backward pass. `dys` are gradients that later blocks write, by the first batch's tensors."""
        self.dys = [dys[memory_of(y)] if memory_of(y) in dys else torch.zeros_like(y) for y in call.outputs]
        sizes = [p.numel() for p in self.parameters]
        self.sums = torch.zeros(sum(sizes), dtype=torch.float32, device=self.results[0].device)
        grads = self.sums.split(sizes)
        self.grads = [grad.view_as(p) for grad, p in zip(grads, self.parameters, strict=True)]

        def backward() -> list[Tensor]:
            pairs = [(y, dy) for y, dy in zip(self.outputs, self.dys, strict=True) if y.requires_grad]
            ys, given = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(ys, self.wanted, given, allow_unused=True, materialize_grads=True)
            for grad, total in zip(gradients[len(self.inputs) :], self.grads, strict=True):
                total.add_(grad)
            return list(gradients[: len(self.inputs)])

        with self.failures():
            self.dxs, self.replay_backward = recorder.record(backward)
        inputs = [memory_of(x) for x, (*_, wants_grad) in zip(call.tensors, call.kinds, strict=True) if wants_grad]
        dys |= dict(zip(inputs, self.dxs, strict=True))
        self.outputs, self.ready = [], True  # autograd's graph of the captured pass, which is no longer needed

    @property
    def wanted(self) -> list[Tensor]:
        return [*self.inputs, *self.parameters]

    def computing(self) -> Any:
        """The autocast that the model runs in. What it casts it must not keep: a graph's memory is reused."""
        enabled, dtype = self.autocast
        return torch.autocast(self.kinds[0][2].type, dtype=dtype, enabled=enabled, cache_enabled=False)

    def check(self, call: Call) -> None:
        """
        Raises:
            RunError: the block is called with, or returns, something that a graph cannot hold.
        """
        if call.strange:
            raise RunError(
                f"cuda_graphs: {self.name} is called with a {type(call.strange[0]).__name__}, which a graph cannot "
                "hold; attn_implementation sdpa or cuda_graphs false may help"
            )
        if any(p.dtype != torch.float32 for p in self.module.parameters() if p.requires_grad):
            raise RunError(f"cuda_graphs: what {self.name} trains must be in float32; use cuda_graphs false")

    @contextmanager
    def failures(self) -> Iterator[None]:
        """
        Raises:
            RunError: in place of what torch raises where something cannot be captured.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RunError(
                f"cuda_graphs: {type(self.module).__name__} {self.name} cannot be captured ({reason(error)}); use "
                "cuda_graphs false"
            ) from error

    # ---- replay

    def backward(self, dys: tuple[Tensor | None, ...], replay: int) -> list[Tensor]:
        if replay != self.replays:
            raise RuntimeError(f"cuda_graphs: {self.name} was called again before the backward pass of its last call")
        for static, dy in zip(self.dys, dys, strict=True):
            if dy is None:
                static.zero_()
            elif memory_of(static) != memory_of(dy):
                static.copy_(dy)
        before = [p.grad for p in self.parameters]
        others: list[tuple[Tensor, Tensor]] = []
        if any(grad is not own for grad, own in zip(before, self.grads, strict=True)):
            # The first batch of a step, when no parameter has a gradient; or one that the block was not replayed in.
            others = [(own, g.clone()) for g, own in zip(before, self.grads, strict=True) if g is not None]
            self.sums.zero_()
            for p, own in zip(self.parameters, self.grads, strict=True):
                p.grad = own
        self.replay_backward()
        for own, grad in others:
            own.add_(grad)
        return [dx.detach() for dx in self.dxs]


class _Place:
    """A tensor at an address that graphs read, the same for all blocks that are called with the same tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.last: tuple[weakref.ref[Tensor], int] | None = None  # what stands there, and its version

    def take(self, given: Tensor) -> None:
        if self.last is not None and self.last[0]() is given and self.last[1] == version_of(given):
            return
        if memory_of(self.tensor) != memory_of(given):
            self.tensor.copy_(given)
        self.last = weakref.ref(given), version_of(given)


class _Replay(torch.autograd.Function):
    """Replays a block; autograd knows by its arguments what wants a gradient. Those of parameters are added up by the
    graph itself."""

    @staticmethod
    def forward(ctx: Any, block: _Block, *tensors: Tensor) -> tuple[Tensor, ...]:
        block.replays += 1
        ctx.block, ctx.replay = block, block.replays
        block.replay_forward()
        return tuple(result.detach() for result in block.results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        block = ctx.block
        return None, *block.backward(dys, ctx.replay), *[None for _ in block.parameters]
