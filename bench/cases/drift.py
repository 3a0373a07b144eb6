"""How parameters without a gradient move when their moments are in 8 bits: a table of the case adamw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nf4lora import PagedAdamW

from ..harness.case import Settings, installed, without
from ..harness.table import Table

COUNT = 4096  # values; for smaller parameters bitsandbytes keeps moments in 32 bits
STILL, WAITED = 50, 100  # steps with all gradients; steps without every second one until the drift is measured
Stepper = Callable[[torch.nn.Parameter], torch.optim.Optimizer]


def table(settings: Settings) -> Table:
    seeds, steps = (1, 160) if settings.quick else (3, 350)
    optimizers: dict[str, Stepper] = {
        "32 bits": lambda p: PagedAdamW([p], lr=1.0, weight_decay=0.0),
        "8 bits": lambda p: PagedAdamW([p], lr=1.0, weight_decay=0.0, bits=8),
    }
    if installed("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit

        optimizers["bitsandbytes"] = lambda p: AdamW8bit([p], lr=1.0, weight_decay=0.0)
    rows, targets = [], []
    for changing in (False, True):
        for spread in (0.0, 2.0):
            moved = {
                name: drift(stepper, seeds, steps, changing, spread, settings.device)
                for name, stepper in optimizers.items()
            }
            before = f"{'change' if changing else 'stand still'}, {'sizes differ' if spread else 'of one size'}"
            row: dict = {"gradients before": before}
            for name, (most, mean) in moved.items():
                row |= {f"{name}, most": most, f"{name}, mean": mean}
            rows.append(row)
            if "bitsandbytes" in moved and not settings.quick:
                met = all(ours <= rival for ours, rival in zip(moved["8 bits"], moved["bitsandbytes"]))
                targets.append((f"gradients that {before}: no more drift than bitsandbytes", met))
    return Table(
        "Drift of parameters whose gradient has ended, in learning rates a step",
        rows,
        [
            f"{STILL} steps in which all have a gradient, then every second one has a gradient of zero; from {WAITED} "
            f"steps later on, the mean step of each of these over {steps - STILL - WAITED} steps, of {seeds} seeds",
            "sizes differ: within a block of 256, by a factor of e^2 in the standard deviation of their logarithm",
            *without("bitsandbytes"),
        ],
        targets,
    )


def drift(stepper: Stepper, seeds: int, steps: int, changing: bool, spread: float, device: str) -> tuple[float, float]:
    """The largest and the mean drift of the values whose gradient has ended."""
    drifts = []
    for seed in range(seeds):
        p = torch.nn.Parameter(torch.zeros(COUNT, device=device))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = stepper(p)
        moved = torch.zeros(COUNT, device=device)
        for step, grad in enumerate(gradients(seed, steps, changing, spread)):
            p.grad = grad.to(device)
            p.data.zero_()  # so that a step is not lost to the parameter's rounding
            optimizer.step()
            if step >= STILL + WAITED:
                moved += p.detach()
        drifts.append(moved[::2].abs() / (steps - STILL - WAITED))
    of_all = torch.cat(drifts)
    return of_all.max().item(), of_all.mean().item()


def gradients(seed: int, steps: int, changing: bool, spread: float) -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(COUNT, generator=rng))
    drawn = torch.randn(COUNT, generator=rng)
    for step in range(steps):
        if changing:
            drawn = torch.randn(COUNT, generator=rng)
        grad = drawn * size
        if step >= STILL:
            grad[::2] = 0.0
        yield grad
