"""lora: the linear layer with its adapter, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4Linear, ops, reference

from .case import Settings, check_close, installed, without
from .contenders import ALPHA, RANK
from .machine import bandwidth
from .shapes import QUICK, Shape, named
from .table import Table
from .timing import Timing, alternate, rotation

QUESTION = "What does a layer with LoRA cost beside a 16-bit layer without, and beside bitsandbytes + PEFT?"

SHAPES = named("SmolLM2-135M gate, up", "Llama-3.1-8B q, o", "Llama-3.1-8B gate, up", "Qwen2.5-7B down")
TOKENS = (1, 4, 16, 128, 512, 2048)


def run(settings: Settings) -> list[Table]:
    shapes, tokens = (QUICK, (1, 16)) if settings.quick else (SHAPES, TOKENS)
    rows = [row for shape in shapes for row in rows_of(shape, tokens, settings)]
    read = bandwidth(settings.device, 16 if settings.quick else 256)["read"] / 1e9
    notes = [
        "LoRA of rank 16 on bf16 input, layers made by PEFT; torch is F.linear in bf16 without any LoRA, its weight "
        "frozen as ours is",
        "torch / ours, bitsandbytes / ours: their time over ours",
        *without("bitsandbytes"),
    ]
    packed = f"packed GB/s: codes and scales over time; torch's sum over int64 reads {read:.1f} GB/s here"
    in_training = "backward: dx, dA and dB; torch's dx alone"
    return [
        Table("Forward, no gradients", [row["forward"] for row in rows], [*notes, packed]),
        Table("Forward and backward", [row["both"] for row in rows], [*notes, in_training]),
        autograd(settings),
    ]


def rows_of(shape: Shape, tokens: tuple[int, ...], settings: Settings) -> list[dict[str, dict]]:
    """One row of either table for each number of tokens."""
    weight = torch.randn(shape.N, shape.K, device=settings.device).mul_(0.02).bfloat16()
    base = NF4Linear.from_linear(linear(weight))
    nbytes = sum(parameter.nbytes for parameter in base.parameters())

    def rotated(make: Callable[[], nn.Module], size: int, kind: str) -> Callable[[], nn.Module]:
        def ready(_: int) -> nn.Module:
            layer = make().train(kind == "both")
            forward(lambda: layer, torch.ones(1, shape.K, device=settings.device).bfloat16())
            return layer

        return partial(next, rotation(ready, size, settings.device))

    contenders: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "nf4lora": (lambda: with_lora(copied(base)), nbytes),
        "torch": (lambda: linear(weight.clone()), weight.nbytes),
    }
    if installed("bitsandbytes"):
        contenders["bitsandbytes"] = (lambda: with_lora(of_bitsandbytes(weight)), nbytes)
    found: list[dict[str, dict]] = [{} for _ in tokens]
    for kind in ("forward", "both"):  # layers of their own: bitsandbytes repacks one for good when it is evaluated
        turns = {name: rotated(make, size, kind) for name, (make, size) in contenders.items()}
        check(shape, turns, kind, settings.device)
        for row, M in zip(found, tokens, strict=True):
            x = torch.randn(M, shape.K, device=settings.device).bfloat16()
            dy = torch.randn(M, shape.N, device=settings.device).bfloat16()
            calls = {name: partial(CALLS[kind], turn, x, dy) for name, turn in turns.items()}
            seconds = 0.1 if settings.quick else 2.0
            took = alternate(calls, seconds=seconds, most=100, device=settings.device)
            row[kind] = described(shape, M, took, kind, nbytes)
    return found


def described(shape: Shape, M: int, took: dict[str, Timing], kind: str, nbytes: int) -> dict:
    ours = took["nf4lora"]
    products = 2 if kind == "both" else 1  # y = x W^T, dx = dy W
    flops = products * 2 * M * (shape.weights + RANK * (shape.N + shape.K))
    if kind == "both":
        flops += 2 * M * RANK * (shape.N + shape.K)  # dA, dB
    row: dict = {
        "layer": shape.name,
        "M": M,
        "ours, ms": ours.spread(),
        "GFLOP/s": flops / ours.median / 1e9,
        "torch / ours": took["torch"].over(ours),
        "bitsandbytes / ours": took["bitsandbytes"].over(ours) if "bitsandbytes" in took else None,
    }
    if kind == "forward":
        row["packed GB/s"] = nbytes / ours.median / 1e9
    return row


def check(shape: Shape, turns: dict[str, Callable], kind: str, device: str, M: int = 8) -> None:
    """Ours against the reference, the rivals against ours: they must at least do the same work."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(M, size, generator=generator).bfloat16() for size in (shape.K, shape.N))
    layer = turns["nf4lora"]()
    A, B = layer.lora_A["default"].weight.data.cpu(), layer.lora_B["default"].weight.data.cpu()
    packed = {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in layer.base_layer.op_arguments().items()
    }
    y, S = reference.lora_linear(x, **packed, lora_A=A, lora_B=B, scaling=ALPHA / RANK)
    expected = (y,)
    if kind == "both":
        expected = reference.lora_linear_backward(dy, x, S, **packed, lora_A=A, lora_B=B, scaling=ALPHA / RANK)

    def answer(name: str) -> tuple[Tensor, ...]:
        found = CALLS[kind](turns[name], x.to(device), dy.to(device))
        return tuple(each.cpu() for each in (found if isinstance(found, tuple) else (found,)))

    for number, (found, wanted) in enumerate(zip(answer("nf4lora"), expected, strict=True)):
        check_close(f"lora_linear {shape.name}, {kind} {number}", found, wanted, 2**-7)  # bf16: a last place of 2**-8
    if "bitsandbytes" in turns:
        for number, (found, wanted) in enumerate(zip(answer("bitsandbytes"), expected, strict=True)):
            check_close(f"bitsandbytes {shape.name}, {kind} {number}", found, wanted, 0.02)


# ---- how the op is given its gradient ----


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


def autograd(settings: Settings) -> Table:
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
        ["both compile with fullgraph=True (tests/test_lora.py); ops.py uses the first"],
    )
