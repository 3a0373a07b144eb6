"""adamw: one step of the optimizer over all parameters, in 32 and in 8 bits, and with its state paged out."""

from __future__ import annotations

import torch

from nf4lora import ops, reference

from . import paging
from .case import Settings, check_equal
from .table import Table
from .timing import alternate

QUESTION = "What does a step of AdamW cost in time and in bytes?"
NUMBERS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}


def run(settings: Settings) -> list[Table]:
    count = 1 << 16 if settings.quick else 20_000_000 if settings.device == "cpu" else 100_000_000
    rows = [row(count, dtype, settings) for dtype in (torch.float32, torch.bfloat16)]
    return [
        Table(
            f"One step of AdamW, {count / 1e6:.3g} M values",
            rows,
            [
                "fused / ours: torch.optim.AdamW(fused=True), moments in the parameter's dtype, over ours",
                "GB/s: of parameter and moments read and written, gradient read",
                "state: bytes of moments per value",
            ],
        ),
        *([paging.on_disk(count, settings)] if settings.device == "cpu" else paging.on_card(count, settings)),
    ]


def row(count: int, dtype: torch.dtype, settings: Settings) -> dict:
    device = settings.device
    param, grad = torch.randn(count).to(device, dtype), torch.randn(count).to(device, dtype)
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    wide = [torch.zeros(count, device=device) for _ in range(2)]
    narrow = [torch.full((count,), zero, dtype=torch.uint8, device=device) for zero in (127, 0)]
    absmax = torch.zeros(-(-count // 256), 2, device=device)
    check(param, grad)
    mine = torch.nn.Parameter(param.clone())
    mine.grad = grad
    fused = torch.optim.AdamW([mine], lr=1e-3, fused=True)
    times = alternate(
        {
            "32": lambda: ops.adamw_step_([param], [grad], [wide[0]], [wide[1]], [], skipped, **NUMBERS),
            "8": lambda: ops.adamw_step_([param], [grad], [narrow[0]], [narrow[1]], [absmax], skipped, **NUMBERS),
            "fused": fused.step,
        },
        seconds=0.1 if settings.quick else 2.0,
        device=device,
    )
    moments = {"32": 8.0, "8": sum(t.nbytes for t in (*narrow, absmax)) / count}
    result: dict = {"dtype": str(dtype).removeprefix("torch."), "fused, ms": times["fused"].spread()}
    for bits, held in moments.items():
        moved = count * (3 * param.element_size() + 2 * held)
        result |= {
            f"{bits} bits, ms": times[bits].spread(),
            f"{bits} bits, fused / ours": times["fused"].over(times[bits]),
            f"{bits} bits, GB/s": moved / times[bits].median / 1e9,
            f"{bits} bits, state": held,
        }
    return result


def check(param: torch.Tensor, grad: torch.Tensor) -> None:
    """A step of the first values is that of the reference."""
    some, g = param[:5000].clone(), grad[:5000]
    state = [torch.zeros(5000, device=some.device) for _ in range(2)]
    want = reference.adamw_step(some.cpu(), g.cpu(), *(t.cpu() for t in state), **NUMBERS)
    skipped = torch.zeros(1, dtype=torch.int64, device=some.device)
    ops.adamw_step_([some], [g], [state[0]], [state[1]], [], skipped, **NUMBERS)
    for name, got, expected in zip(("param", "exp_avg", "exp_avg_sq"), (some, *state), want, strict=False):
        check_equal(f"adamw_step_, {name}", got.cpu(), expected)
