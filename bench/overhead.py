"""What a call of the op costs before it computes anything, for two ways of giving it its gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nf4lora import ops

from .case import Settings
from .table import Table
from .timing import alternate


class Function(torch.autograd.Function):
    """The other way to differentiate the op, beside torch.library.register_autograd, which ops.py uses."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.nf4lora.lora_linear(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ops._setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dS: Tensor | None) -> tuple:  # type: ignore[override]
        return ops._backward(ctx, dy, dS)


def overhead(settings: Settings) -> Table:
    """Microseconds of a call so small that nothing but its overhead is left."""
    repeats = 20 if settings.quick else 200
    x, A, B = (torch.randn(shape, device=settings.device) for shape in ((1, 64), (4, 64), (64, 4)))
    qweight, absmax = ops.nf4_quantize(torch.randn(64, 64, device=settings.device))
    arguments = (x, qweight, absmax, None, None, A, B, 1.0, 0.0, None, 64)
    ways = {
        "torch.library.register_autograd": lambda: ops.lora_linear(*arguments),
        "autograd.Function": lambda: Function.apply(*arguments)[0],
    }
    ones = torch.ones(1, 64, device=settings.device)
    inputs = [tensor.requires_grad_() for tensor in (x, A, B)]

    def without_gradient(way: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            for _ in range(repeats):
                way()

    def with_gradient(way: Callable[[], Tensor]) -> None:
        for _ in range(repeats):
            way()

    def differentiated(way: Callable[[], Tensor]) -> None:
        for _ in range(repeats):
            torch.autograd.grad(way(), inputs, ones)

    rows: list[dict] = [{"way": name} for name in ways]
    for label, measured in (
        ("without gradients, us", without_gradient),
        ("forward, us", with_gradient),
        ("forward and backward, us", differentiated),
    ):
        took = alternate({name: partial(measured, way) for name, way in ways.items()}, device=settings.device)
        for row in rows:
            row[label] = took[row["way"]].spread(1e6 / repeats)
    return Table(
        "Overhead of a call, M = 1, 64 x 64, rank 4",
        rows,
        ["both compile with fullgraph=True; ops.py uses the first, and neither where no gradient is wanted"],
    )
