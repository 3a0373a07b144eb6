"""overhead: what a call of the op and of the layer costs where nothing is large enough to take time but the call.

Both dtypes are measured: on a card float32 takes another path than the 16 bits that are trained in. The other
tables have the host's part of CUDA calls, without a card.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from nf4lora import NF4Linear, ops

from ..harness import layers, steady
from ..harness.case import Settings
from ..harness.table import Table
from ..harness.timing import CLOCKS, HOW, IN_A_ROW, Clock, Timing, alternate, heading
from . import host

QUESTION = "What does the host pay for a call of the op, and of the layer around it?"

SIZE, RANK = 64, 4  # of the op's weight and adapter
LAYER_SIZE = 128  # torchao packs no fewer weights; the rank is that of all contenders
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
OP, REGISTERED, LINEAR = "ops.lora_linear", "torch.ops.nf4lora.lora_linear", "F.linear, without LoRA"


def run(settings: Settings) -> list[Table]:
    return [of_op(settings), of_layer(settings), *host.tables(settings)]


def of_op(settings: Settings) -> Table:
    """Each way of calling the op, in both dtypes."""
    rows = []
    for text, dtype in DTYPES.items():
        x, A, B = (torch.randn(shape, device=settings.device) for shape in ((1, SIZE), (RANK, SIZE), (SIZE, RANK)))
        weight = torch.randn(SIZE, SIZE, device=settings.device)
        packed = (*ops.nf4_quantize(weight), None, None)
        x, weight = x.to(dtype).requires_grad_(), weight.to(dtype)
        A.requires_grad_(), B.requires_grad_()
        arguments = (x, *packed, A, B, 1.0, 0.0, None, 64)
        calls: dict[str, Callable[[], Tensor]] = {
            OP: partial(ops.lora_linear, *arguments),
            REGISTERED: partial(_first, torch.ops.nf4lora.lora_linear, *arguments),
            LINEAR: partial(torch.nn.functional.linear, x, weight),
        }
        rows += rows_of(calls, (x, A, B), {"dtype": text}, settings, share=0.5)
    return Table(
        f"Overhead of a call of the op, M = 1, {SIZE} x {SIZE}, rank {RANK}",
        rows,
        [
            f"{OP} has a torch.autograd.Function for eager code, nothing where none is wanted; the op itself has a "
            "registered gradient, for torch.compile",
            *_how(settings),
        ],
    )


def of_layer(settings: Settings) -> Table:
    """The whole layer as it is trained, beside the others; on a CPU from both that run there."""
    weight = torch.randn(LAYER_SIZE, LAYER_SIZE, device=settings.device).mul_(0.02).bfloat16()
    x = torch.ones(1, LAYER_SIZE, dtype=torch.bfloat16, device=settings.device).requires_grad_()
    names = layers.present()
    calls: dict[str, Callable[[], Tensor]] = {
        "NF4Linear, without LoRA": partial(NF4Linear.from_linear(layers.linear(weight)), x)
    }
    wanted = [x]
    for name in names:
        layer: nn.Module = layers.MAKERS[name](weight).train()
        wanted += [parameter for parameter in layer.parameters() if parameter.requires_grad]
        calls[name] = partial(layer, x)
    return Table(
        f"Overhead of a call of the layer, M = 1, {LAYER_SIZE} x {LAYER_SIZE}, rank {layers.RANK}, bf16",
        rows_of(calls, wanted, {}, settings, share=0.25),
        [*layers.notes(names), *_how(settings)],
    )


def rows_of(
    calls: dict[str, Callable[[], Tensor]], inputs: list[Tensor] | tuple[Tensor, ...], common: dict, settings: Settings,
    share: float,
) -> list[dict]:  # fmt: skip
    """Microseconds of each way: without gradients, forward, and with the backward pass, by each clock.

    `share` is the part of a second that each of these measurements takes.
    """
    rows: list[dict] = [{**common, "way": name} for name in calls]
    dy = next(iter(calls.values()))().detach()
    repeats = 1 if settings.device == "cuda" else 20 if settings.quick else 200
    moved = []
    for label, kind in (("without gradients", without_gradient), ("forward", _plain), ("forward and backward", both)):
        made = {name: partial(repeated, repeats, kind, call, inputs, dy) for name, call in calls.items()}
        for clock, measured in clocks(settings).items():

            def measure(look: Callable[[], None], made: dict = made, clock: Clock = measured) -> dict[str, Timing]:
                seconds = 0.05 if settings.quick else share
                return alternate(made, seconds=seconds, device=settings.device, clock=clock, between=look)

            took, movement = steady.steadily(measure, settings.device)
            moved.append(movement)
            for row in rows:
                row[", ".join(filter(None, [label, clock, "us"]))] = took[row["way"]].spread(1e6 / repeats)
    if settings.device == "cuda":
        for row in rows:
            row["host moved"] = steady.shown(max(moved))
    return rows


def clocks(settings: Settings) -> dict[str, Clock]:
    """By heading. On a CPU there is one, without a name."""
    if settings.device == "cuda":
        return {heading(name): CLOCKS["cuda"][name] for name in settings.clocks}
    return {"": CLOCKS["cpu"][IN_A_ROW]}


def repeated(repeats: int, function: Callable[..., object], *arguments: object) -> None:
    """Call so many times; on a CPU a single call is too short to be timed."""
    for _ in range(repeats):
        function(*arguments)


def without_gradient(call: Callable[[], Tensor], inputs: object, dy: object) -> None:
    with torch.no_grad():
        call()


def _plain(call: Callable[[], Tensor], inputs: object, dy: object) -> None:
    call()


def both(call: Callable[[], Tensor], inputs: list[Tensor], dy: Tensor) -> None:
    torch.autograd.grad(call(), inputs, dy, allow_unused=True)


def _first(op: Callable, *arguments: object) -> Tensor:
    return op(*arguments)[0]


def _how(settings: Settings) -> list[str]:
    return [HOW, steady.NOTE] if settings.device == "cuda" else []
