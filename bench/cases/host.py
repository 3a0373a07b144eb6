"""The host's part of calls of CUDA ops, without a card: of a layer, of a group of layers, of blocks. Tables of the case
overhead.

A call of a small layer takes a card less time than the host needs to launch it. The host's time is measured here on a
card that computes nothing (bench/harness/card), in a process that sees it: Python, torch's dispatcher, autograd and our
launchers run as they do before a real card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nf4lora import NF4Linear, ops
from nf4lora.compat.torch import below_autograd
from nf4lora.ops.lora_group import Layers

from ..harness import card, groups, layers
from ..harness.case import Settings
from ..harness.process import Process
from ..harness.random_model import FEW_WORDS, adapted
from ..harness.table import Table
from ..harness.timing import alternate, timed

OP, AUTOGRAD, LAYER, LINEAR = "torch.ops.nf4lora.lora_linear", "ops.lora_linear", "NF4LoraLinear", "F.linear, no LoRA"
FORWARD, RECORDED, BACKWARD, BOTH = (
    "forward, no gradients, us",
    "forward, us",
    "backward, us",
    "forward and backward, us",
)
GROUP_OP, GROUP, THREE_LAYERS = "torch.ops.nf4lora.lora_linear_group", "ops.lora_linear_group", "three NF4LoraLinear"
BLOCK = "forward and backward, us a block"
TOKENS = (1, 512, 2048)
BLOCKS = 4
MOST = {FORWARD: 30, BACKWARD: 55}  # microseconds of the op on the machine on which this was set as a target


def tables(settings: Settings) -> list[Table]:
    """Microseconds of the host, and launches, per call; without rows where there is a GPU or no card can be built."""
    size, rank = (128, 4) if settings.quick else (4096, 16)
    on = "on a card that computes nothing"
    shape = "tiny" if settings.quick else FEW_WORDS
    titles = {
        "op": f"Host time of the CUDA op {on}, {size} x {size}, rank {rank}, bf16",
        "group": f"Host time of q, k and v {on}, {size} + {size // 4} + {size // 4} x {size}, rank {rank}, bf16",
        "blocks": f"Host time of blocks {on}, {BLOCKS} blocks of {shape}, bf16",
    }
    if (why := card.reason()) is not None:
        return [Table(title, [], [f"not measured: {why}"]) for title in titles.values()]
    library = card.operators()
    arguments = {"library": library, "size": size, "rank": rank, "shape": shape, "quick": settings.quick}
    rows: dict[str, list[dict]] = {name: [] for name in titles}
    with Process("host", card.environment(), **arguments) as process:
        for _ in TOKENS[: 1 if settings.quick else None]:
            for name, of_table in next(process).items():
                rows[name] += of_table
    cuda = (
        "CUDA's own runtime and driver are not in these times: the calls that they would take time for are counted as "
        "launches and allocations of torch"
    )
    notes = {
        "op": f"{OP}: the op alone, below autograd; {AUTOGRAD}: with it; {LAYER}: PEFT's layer around it, in double "
        "quantisation like the others",
        "group": f"{GROUP_OP}: the group's op alone, below autograd; {GROUP}: with it; {THREE_LAYERS}: PEFT's layers "
        "called in turn with one x, together after their group was found, and one by one; dx is the sum of all",
        "blocks": "without head, loss and optimiser; the embedding and the last norm are divided among the blocks; one "
        "by one: the same model where no layers are computed together",
    }
    promised = {"op": [] if settings.quick else targets(rows["op"])}
    return [Table(title, rows[name], [notes[name], cuda], promised.get(name, [])) for name, title in titles.items()]


def targets(rows: list[dict]) -> list[tuple[str, bool]]:
    """What the op alone is held to."""
    return [
        (f"{row['tokens']} tokens, {heading[:-4]}: at most {most} us, got {row[heading]['median']:.0f}",
         row[heading]["median"] <= most)
        for row in rows
        if row["way"] == OP
        for heading, most in MOST.items()
    ]  # fmt: skip


def contender(library: str, size: int, rank: int, shape: str, quick: bool) -> Iterator[dict]:
    """In the process that sees the card: the rows of all tables, of one number of tokens after the other."""
    card.load(library)
    model = adapted(layers.OURS, shape, "cpu", BLOCKS).cuda().get_base_model().model
    for tokens in TOKENS:
        yield {
            "op": rows_of(tokens, ways(tokens, size, rank), quick),
            "group": rows_of(tokens, ways_of_group(tokens, (size, size // 4, size // 4), size, rank), quick),
            "blocks": rows_of_blocks(model, tokens, quick),
        }


Ways = dict[str, dict[str, Callable[[], object]]]  # what is called, by way and heading


def rows_of(tokens: int, calls: Ways, quick: bool) -> list[dict]:
    """One row for each way to call."""
    repeats = 5  # few: a sample shall end before the system gives the core to somebody else
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


def ways(tokens: int, size: int, rank: int) -> Ways:
    """A single layer."""
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    weight = torch.zeros(size, size, dtype=torch.bfloat16)
    packed = packed_on_card(weight)
    x, dy, S = torch.zeros(tokens, size, **bf16), torch.zeros(tokens, size, **bf16), torch.zeros(tokens, rank, **bf16)
    A, B = torch.zeros(rank, size, device="cuda"), torch.zeros(size, rank, device="cuda")
    op, gradient = torch.ops.nf4lora.lora_linear.default, torch.ops.nf4lora.lora_linear_backward.default
    adapter = (1.0, 0.0, None, 64)
    calls: Ways = {
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


def ways_of_group(tokens: int, out_features: tuple[int, ...], size: int, rank: int) -> Ways:
    """Layers with the same input."""
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    weights = [torch.zeros(N, size, dtype=torch.bfloat16) for N in out_features]
    packed = [packed_on_card(weight) for weight in weights]
    x, dys = torch.zeros(tokens, size, **bf16), [torch.zeros(tokens, N, **bf16) for N in out_features]
    S = [torch.zeros(tokens, rank, **bf16) for _ in weights]
    As = [torch.zeros(rank, size, device="cuda") for _ in weights]
    Bs = [torch.zeros(N, rank, device="cuda") for N in out_features]
    op, gradient = torch.ops.nf4lora.lora_linear_group.default, torch.ops.nf4lora.lora_linear_group_backward.default
    codes, absmax, nested = zip(*packed, strict=True)
    frozen, numbers = (list(codes), list(absmax), list(nested)), (1.0, 64)
    no_bias = [None for _ in weights]
    calls: Ways = {
        GROUP_OP: {
            FORWARD: inside(below_autograd, partial(op, x, *frozen, no_bias, As, Bs, *numbers)),
            BACKWARD: inside(below_autograd, partial(gradient, dys, x, S, *frozen, As, Bs, *numbers, True)),
        }
    }
    x, *factors = (tensor.detach().requires_grad_() for tensor in (x, *As, *Bs))
    As, Bs = factors[: len(As)], factors[len(As) :]
    inputs = [x, *factors]
    layers_of_group = Layers(*frozen, no_bias, As, Bs)
    calls[GROUP] = differentiated(partial(ops.lora_linear_group, x, layers_of_group), inputs, dys)

    def single_ops() -> list[Tensor]:
        parts = zip(packed, As, Bs, strict=True)
        return [ops.lora_linear(x, *weight, None, A, B, 1.0) for weight, A, B in parts]

    calls[f"three {AUTOGRAD}"] = differentiated(single_ops, inputs, dys)
    layers_in_turn = groups.SameInput(weights, "cuda")
    parameters = [parameter for parameter in layers_in_turn.parameters() if parameter.requires_grad]
    in_turn = partial(layers_in_turn, x)
    calls[f"{THREE_LAYERS}, together"] = differentiated(in_turn, [x, *parameters], dys)
    calls[f"{THREE_LAYERS}, one by one"] = differentiated(inside(groups.apart, in_turn), [x, *parameters], dys)
    bases = [weight.cuda() for weight in weights]
    calls[f"three {LINEAR}"] = differentiated(lambda: [torch.nn.functional.linear(x, base) for base in bases], [x], dys)
    return calls


def packed_on_card(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed on the CPU: the op waits for its verdict, which no kernel gives on that card."""
    qweight, absmax = ops.nf4_quantize(weight)
    codes, nested = ops.absmax_quantize(absmax)
    return qweight.cuda(), codes.cuda(), nested.cuda()


def rows_of_blocks(model: Any, tokens: int, quick: bool) -> list[dict]:
    """A model of BLOCKS blocks without its head, with groups and one by one."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")
    dy = torch.zeros(1, tokens, model.config.hidden_size, dtype=torch.bfloat16, device="cuda")

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(input_ids=ids).last_hidden_state, wanted, dy)

    calls = {"together": both, "one by one": inside(groups.apart, both)}
    groups.learn(model, lambda: model(input_ids=ids), [3, 2] * BLOCKS)
    took = alternate(calls, seconds=0.2 if quick else 4.0, most=200, clock=timed)
    rows = []
    for way, call in calls.items():
        with card.counting() as done:
            call()
        rows.append(
            {
                "tokens": tokens,
                "way": way,
                BLOCK: took[way].spread(1e6 / BLOCKS),
                "of one by one": took[way].over(took["one by one"]),
                "launches a block": done.launches / BLOCKS,
                "allocations a block": done.allocations / BLOCKS,
            }
        )
    return rows


def differentiated(
    call: Callable[[], Tensor | Sequence[Tensor]], inputs: list[Tensor], dy: Tensor | list[Tensor]
) -> dict[str, Callable[[], object]]:
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
