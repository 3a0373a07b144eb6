"""The overhead of a call of the op, for both ways in which it defines its gradient: a table of the case lora."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nf4lora import ops

from ..harness.case import Settings
from ..harness.table import Table
from ..harness.timing import alternate


def overhead(settings: Settings) -> Table:
    """Microseconds of a call that is so small that only its overhead takes time."""
    repeats = 20 if settings.quick else 200
    x, A, B = (torch.randn(shape, device=settings.device) for shape in ((1, 64), (4, 64), (64, 4)))
    qweight, absmax = ops.nf4_quantize(torch.randn(64, 64, device=settings.device))
    arguments = (x, qweight, absmax, None, None, A, B, 1.0, 0.0, None, 64)
    weight = torch.randn(64, 64, device=settings.device)
    calls = {
        "ops.lora_linear": lambda: ops.lora_linear(*arguments),
        "torch.ops.nf4lora.lora_linear": lambda: torch.ops.nf4lora.lora_linear(*arguments)[0],
        "F.linear, without LoRA": lambda: torch.nn.functional.linear(x, weight),
    }
    ones = torch.ones(1, 64, device=settings.device)
    inputs = [tensor.requires_grad_() for tensor in (x, A, B)]

    def without_gradient(call: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            for _ in range(repeats):
                call()

    def with_gradient(call: Callable[[], Tensor]) -> None:
        for _ in range(repeats):
            call()

    def differentiated(call: Callable[[], Tensor]) -> None:
        for _ in range(repeats):
            torch.autograd.grad(call(), inputs, ones, allow_unused=True)

    rows: list[dict] = [{"way": name} for name in calls]
    for label, measured in (
        ("without gradients, us", without_gradient),
        ("forward, us", with_gradient),
        ("forward and backward, us", differentiated),
    ):
        took = alternate({name: partial(measured, call) for name, call in calls.items()}, device=settings.device)
        for row in rows:
            row[label] = took[row["way"]].spread(1e6 / repeats)
    return Table(
        "Overhead of a call, M = 1, 64 x 64, rank 4",
        rows,
        [
            "ops.lora_linear has a torch.autograd.Function for eager code, nothing where none is wanted; the op "
            "itself has a registered gradient, for torch.compile"
        ],
    )
