"""The host's part of a call of the CUDA op, without a card: a table of the case overhead.

A call of a small layer takes a card less time than the host needs to launch it. The host's time is measured here on a
card that computes nothing (bench/harness/card), in a process that sees it: Python, torch's dispatcher, autograd and our
launchers run as they do before a real card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..harness import card
from ..harness.case import Settings
from ..harness.process import Process
from ..harness.table import Table
from ..harness.timing import alternate, timed

OP, AUTOGRAD, LAYER, LINEAR = "torch.ops.nf4lora.lora_linear", "ops.lora_linear", "NF4LoraLinear", "F.linear, no LoRA"
FORWARD, RECORDED, BACKWARD, BOTH = (
    "forward, no gradients, us",
    "forward, us",
    "backward, us",
    "forward and backward, us",
)
TOKENS = (1, 512, 2048)
MOST = {FORWARD: 30, BACKWARD: 55}  # microseconds of the op on the machine on which this was set as a target


def table(settings: Settings) -> Table:
    """Microseconds of the host, and launches, per call; without rows where there is a GPU or no card can be built."""
    size, rank = (128, 4) if settings.quick else (4096, 16)
    title = f"Host time of the CUDA op on a card that computes nothing, {size} x {size}, rank {rank}, bf16"
    if (why := card.reason()) is not None:
        return Table(title, [], [f"not measured: {why}"])
    library = card.operators()
    arguments = {"library": library, "size": size, "rank": rank, "quick": settings.quick}
    with Process("host", card.environment(), **arguments) as process:
        rows = [row for tokens in TOKENS[: 1 if settings.quick else None] for row in next(process)["rows"]]
    notes = [
        f"{OP}: the op alone, below autograd; {AUTOGRAD}: with it; {LAYER}: PEFT's layer around it, in double "
        "quantisation like the others",
        "CUDA's own runtime and driver are not in these times: the calls that they would take time for are counted as "
        "launches and allocations of torch",
    ]
    return Table(title, rows, notes, [] if settings.quick else targets(rows))


def targets(rows: list[dict]) -> list[tuple[str, bool]]:
    """What the op alone is held to."""
    return [
        (f"{row['tokens']} tokens, {heading[:-4]}: at most {most} us, got {row[heading]['median']:.0f}",
         row[heading]["median"] <= most)
        for row in rows
        if row["way"] == OP
        for heading, most in MOST.items()
    ]  # fmt: skip


def contender(library: str, size: int, rank: int, quick: bool) -> Iterator[dict]:
    """In the process that sees the card: the rows of one number of tokens after the other."""
    card.load(library)
    for tokens in TOKENS:
        yield {"rows": rows_of(tokens, size, rank, quick)}


def rows_of(tokens: int, size: int, rank: int, quick: bool) -> list[dict]:
    """One row for each way to call."""
    repeats = 5  # few: a sample shall end before the system gives the core to somebody else
    calls = ways(tokens, size, rank)
    rows: list[dict[str, Any]] = [{"tokens": tokens, "way": way} for way in calls]
    for heading in (FORWARD, RECORDED, BACKWARD, BOTH):
        present = {way: by_heading[heading] for way, by_heading in calls.items() if heading in by_heading}
        repeated = {way: partial(repeat, repeats, call) for way, call in present.items()}
        took = alternate(repeated, seconds=0.2 if quick else 2.0, most=400, clock=timed)
        for row in rows:
            row[heading] = took[row["way"]].spread(1e6 / repeats) if row["way"] in took else None
    for row in rows:
        for heading, name in ((FORWARD, "forward"), (BACKWARD, "backward")):
            with card.counting() as done:
                calls[row["way"]][heading]()
            row[f"launches, {name}"] = done.launches
            row[f"allocations, {name}"] = done.allocations
    return rows


def ways(tokens: int, size: int, rank: int) -> dict[str, dict[str, Callable[[], object]]]:
    """What is called, by way and heading."""
    from nf4lora import NF4Linear, ops
    from nf4lora.compat.torch import below_autograd

    from ..harness import layers

    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    weight = torch.zeros(size, size, dtype=torch.bfloat16)
    qweight, absmax = ops.nf4_quantize(weight)  # on the CPU: the op waits for its verdict, which no kernel gives there
    packed = tuple(tensor.cuda() for tensor in (qweight, *ops.absmax_quantize(absmax)))
    x, dy, S = torch.zeros(tokens, size, **bf16), torch.zeros(tokens, size, **bf16), torch.zeros(tokens, rank, **bf16)
    A, B = torch.zeros(rank, size, device="cuda"), torch.zeros(size, rank, device="cuda")
    op, gradient = torch.ops.nf4lora.lora_linear.default, torch.ops.nf4lora.lora_linear_backward.default
    adapter = (1.0, 0.0, None, 64)
    calls: dict[str, dict[str, Callable[[], object]]] = {
        OP: {
            FORWARD: inside(below_autograd, partial(op, x, *packed, None, A, B, *adapter)),
            BACKWARD: inside(below_autograd, partial(gradient, dy, x, S, *packed, A, B, *adapter, True)),
        }
    }
    x, A, B = (tensor.detach().requires_grad_() for tensor in (x, A, B))
    calls[AUTOGRAD] = differentiated(partial(ops.lora_linear, x, *packed, None, A, B, 1.0), [x, A, B], dy)
    layer = layers.with_lora(NF4Linear.from_linear(layers.linear(weight)).cuda()).train()
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    calls[LAYER] = differentiated(partial(layer, x), [x, *parameters], dy)
    calls[LINEAR] = differentiated(partial(torch.nn.functional.linear, x, weight.cuda()), [x], dy)
    return calls


def differentiated(call: Callable[[], Tensor], inputs: list[Tensor], dy: Tensor) -> dict[str, Callable[[], object]]:
    """A call without and with gradients, its backward pass alone, and both."""
    y = call()
    return {
        FORWARD: inside(torch.no_grad, call),
        RECORDED: call,
        BACKWARD: lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
        BOTH: lambda: torch.autograd.grad(call(), inputs, dy),
    }


def inside(context: Callable[[], AbstractContextManager], call: Callable[[], object]) -> Callable[[], object]:
    def called() -> object:
        with context():
            return call()

    return called


def repeat(repeats: int, call: Callable[[], object]) -> None:
    for _ in range(repeats):
        call()
