"""Layers of ours that are called with the same input, as a model calls them: computed together, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4Linear
from nf4lora.adapters import siblings

from . import expected
from .case import check_close
from .contenders import ALPHA, RANK
from .layers import CALLS, OURS, adapter, linear, with_lora

ONE_BY_ONE = f"{OURS}, one by one"


class SameInput(nn.Module):
    """Layers made by PEFT, each with an adapter of its own, whose group has been found in a first call.

    They are packed where the weights are, and then moved to `device`, if there is one.

    Raises:
        RuntimeError: it was not found.
    """

    def __init__(self, weights: Sequence[Tensor], device: str | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            with_lora(NF4Linear.from_linear(linear(weight)), seed) for seed, weight in enumerate(weights)
        )
        self.train().to(device)
        one = torch.ones(1, weights[0].shape[1], dtype=weights[0].dtype, device=device or weights[0].device)
        learn(self, lambda: self(one), [len(weights)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def learn(model: nn.Module, call: Callable[[], object], sizes: Sequence[int]) -> None:
    """Let the groups of a model be found in a call, so that they are not first found while time is taken.

    Raises:
        RuntimeError: there are no groups of so many layers each, so that what is timed would not be a group.
    """
    with together():
        names = siblings.learn(model, call)
    if sorted(map(len, names)) != sorted(sizes):
        raise RuntimeError(f"the model must have groups of {list(sizes)} layers with the same input, got {names}")


@contextmanager
def _on(devices: set[str]) -> Iterator[None]:
    kept, siblings.DEVICES = siblings.DEVICES, devices
    try:
        yield
    finally:
        siblings.DEVICES = kept


def together() -> AbstractContextManager[None]:
    """Groups are computed together meanwhile, on a CPU too."""
    return _on({"cpu", "cuda"})


def apart() -> AbstractContextManager[None]:
    """No layers are computed together meanwhile."""
    return _on(set())


def calls(kind: str, turn: Callable[[], nn.Module], x: Tensor, dys: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    """Both ways to call the layers of a SameInput, in a kind of CALLS; `turn` returns the one whose turn it is.

    A forward pass records its graph here: without gradients there are no groups.
    """

    def forward() -> Sequence[Tensor]:
        return [y.detach() for y in turn()(x.detach().requires_grad_())]

    def call(how: Callable[[], AbstractContextManager[None]]) -> Any:
        with how():
            return forward() if kind == "forward" else CALLS[kind](turn, x, dys)

    return {OURS: partial(call, together), ONE_BY_ONE: partial(call, apart)}


def check(who: str, kind: str, got: Sequence[Tensor], x: Tensor, dys: Sequence[Tensor], Ws: Sequence[Tensor],
          tolerance: float) -> None:  # fmt: skip
    """Compare what a call of a SameInput over these weights, dequantised, returned with products in float32.

    Raises:
        WrongAnswer: it differs.
    """
    adapters = [adapter(*W.shape, x.device, seed) for seed, W in enumerate(Ws)]
    scaling = ALPHA / RANK
    if kind == "forward":
        wanted = [expected.forward(x, W, A, B, scaling)[0] for W, (A, B) in zip(Ws, adapters, strict=True)]
    else:
        parts = [expected.backward(dy, x, W, A, B, scaling) for dy, W, (A, B) in zip(dys, Ws, adapters, strict=True)]
        dx = torch.stack([part[0] for part in parts]).sum(0)
        wanted = [dx, *(gradient for part in parts for gradient in part[1:])]
    for number, (result, right) in enumerate(zip(got, wanted, strict=True)):
        check_close(f"{who}, {len(x)} tokens, {kind} {number}", result, right, tolerance)
