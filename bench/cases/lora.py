"""lora: the linear layer with its adapter, forward and backward.

Here on a CPU; lora_groups.py has the layers of the same input there, lora_gpu.py the tables of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4Linear, build_info
from nf4lora.ops import reference

from ..harness.case import Settings, check_close, installed, without
from ..harness.contenders import ALPHA, RANK
from ..harness.layers import CALLS, forward, linear, of_bitsandbytes, with_lora
from ..harness.machine import bandwidth
from ..harness.shapes import QUICK, Shape, named
from ..harness.table import Table
from ..harness.timing import Timing, alternate, rotation
from . import lora_gpu, lora_groups

QUESTION = "What does a layer with LoRA cost beside a 16-bit layer without, and beside bitsandbytes + PEFT?"

SHAPES = named("Llama-2-7B gate, up", "SmolLM2-135M down", "TinyLlama-1.1B down", "Llama-3.1-8B down")
TOKENS = (1, 4, 16, 128, 512, 2048)
# Targets for our time over torch's on a CPU with AVX512-BF16, by tokens: forward for the first shape, forward and
# backward for all shapes.
FORWARD = {4: 0.3, 16: 0.7, 128: 0.97, 512: 0.97, 2048: 0.97}
BOTH = {1: 1.0, 4: 1.0, 16: 1.0, 512: 1.03, 2048: 1.03}
OF_BANDWIDTH = 0.95  # target for one token: share of the bandwidth at which torch reads


def run(settings: Settings) -> list[Table]:
    if settings.device == "cuda":
        spare = settings.seconds is None  # the last table is computed on the CPU, where a card would wait
        return [*lora_gpu.tables(settings), *([small_adapters(settings)] if spare else [])]
    shapes, tokens = (QUICK, (1, 16)) if settings.quick else (SHAPES, TOKENS)
    rows = [row for shape in shapes for row in rows_of(shape, tokens, settings)]
    read_rate = bandwidth("cpu", 16 if settings.quick else 256)["read"] / 1e9
    notes = [
        "LoRA of rank 16 on bf16 input, layers made by PEFT; torch is F.linear in bf16 without any LoRA, its weight "
        "frozen as ours is",
        "torch / ours, bitsandbytes / ours: their time over ours",
        *without("bitsandbytes"),
    ]
    packed = f"packed GB/s: codes and scales over time; torch's sum over int64 reads {read_rate:.1f} GB/s here"
    has_targets = build_info()["cpu"] == "avx512bf16" and not settings.quick
    share = rows[0]["forward"]["packed GB/s"] / read_rate
    bandwidth_target = (
        f"1 token: {OF_BANDWIDTH:.0%} of torch's read bandwidth, got {share:.0%}",
        share >= OF_BANDWIDTH,
    )
    in_training = "backward: dx, dA and dB; torch's dx alone"
    return [
        Table(
            "Forward, no gradients",
            [row["forward"] for row in rows],
            [*notes, packed],
            [bandwidth_target, *targets(rows[: len(tokens)], "forward", FORWARD)] if has_targets else [],
        ),
        Table(
            "Forward and backward",
            [row["both"] for row in rows],
            [*notes, in_training],
            targets(rows, "both", BOTH) if has_targets else [],
        ),
        lora_groups.table(settings),
        small_adapters(settings),
    ]


def targets(rows: list[dict[str, dict]], kind: str, allowed: dict[int, float]) -> list[tuple[str, bool]]:
    """A target for each row whose number of tokens has a limit."""
    claims = []
    for row in (by_kind[kind] for by_kind in rows):
        if (limit := allowed.get(row["M"])) is not None:
            ratio = 1 / row["torch / ours"]["median"]
            claim = f"{row['layer']}, {row['M']} tokens: at most {limit} of torch's time, got {ratio:.2f}"
            claims.append((claim, ratio <= limit))
    return claims


def rows_of(shape: Shape, tokens: tuple[int, ...], settings: Settings) -> list[dict[str, dict]]:
    """For each number of tokens a row of either table, by "forward" and "both"."""
    weight = torch.randn(shape.N, shape.K).mul_(0.02).bfloat16()
    nbytes = sum(parameter.nbytes for parameter in NF4Linear.from_linear(linear(weight)).parameters())

    def rotated(make: Callable[[], nn.Module], size: int, kind: str) -> Callable[[], nn.Module]:
        def ready(_: int) -> nn.Module:
            layer = make().train(kind == "both")
            forward(lambda: layer, torch.ones(1, shape.K).bfloat16())
            return layer

        return partial(next, rotation(ready, size))

    contenders: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "nf4lora": (lambda: with_lora(NF4Linear.from_linear(linear(weight))), nbytes),
        "torch": (lambda: linear(weight.clone()), weight.nbytes),
    }
    if installed("bitsandbytes"):
        contenders["bitsandbytes"] = (lambda: with_lora(of_bitsandbytes(weight)), nbytes)
    rows: list[dict[str, dict]] = [{} for _ in tokens]
    for kind in ("forward", "both"):  # separate layers: bitsandbytes repacks a layer permanently when it is evaluated
        turns = {name: rotated(make, size, kind) for name, (make, size) in contenders.items()}
        check_answers(shape, turns, kind)
        for row, M in zip(rows, tokens, strict=True):
            x = torch.randn(M, shape.K).bfloat16()
            dy = torch.randn(M, shape.N).bfloat16()
            calls = {name: partial(CALLS[kind], turn, x, dy) for name, turn in turns.items()}
            took = alternate(calls, seconds=0.1 if settings.quick else 2.0, most=100)
            row[kind] = described(shape, M, took, kind, nbytes)
    return rows


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


def small_adapters(settings: Settings) -> Table:
    """How much of the term that a small adapter adds arrives in the output, in spite of rounding."""
    shape = QUICK[0] if settings.quick else SHAPES[0]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.N, shape.K, generator=generator).mul_(0.02).bfloat16()
    x = torch.randn(64, shape.K, generator=generator).bfloat16()
    made = {"nf4lora": with_lora(NF4Linear.from_linear(linear(weight)))}
    if installed("bitsandbytes"):
        made["bitsandbytes + PEFT"] = with_lora(of_bitsandbytes(weight)).train()  # its base bit-equal to ours
    rows = []
    for share in (0.0001, 0.001, 0.003, 0.01, 0.1):
        row: dict = {"adapter / output, %": 100 * share}
        for name, layer in made.items():
            row[f"arrives, {name}, %"] = 100 * arrives(layer, x, share)
        rows.append(row)
    return Table(
        f"How much of a small adapter arrives in a bf16 output, {shape.name}, 64 tokens",
        rows,
        [
            "adapter / output: root mean square of what the adapter adds, over that of the base's output",
            "arrives: the change of the output along what the adapter adds in float64; 100 % is all of it",
            "PEFT adds the adapter to an output already rounded to bf16, where a change below half a last place is "
            "lost; the fused op adds in float32 and rounds once",
        ],
    )


def arrives(layer: Any, x: Tensor, share: float) -> float:
    """<y(B) - y(0), delta> / <delta, delta>, where delta = scaling x A^T B^T is share times as large as y(0)."""
    A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight
    drawn = B.data.clone()
    B.data.zero_()
    y0 = forward(lambda: layer, x).double()
    S = (x.double() @ A.bfloat16().double().T).bfloat16().double()
    B.data = (drawn * (share * y0.norm() / (ALPHA / RANK * S @ drawn.double().T).norm())).bfloat16().float()
    delta = ALPHA / RANK * S @ B.data.double().T
    y = forward(lambda: layer, x).double()
    B.data = drawn
    return ((y - y0).flatten() @ delta.flatten() / delta.norm() ** 2).item()


def check_answers(shape: Shape, turns: dict[str, Callable], kind: str, M: int = 8) -> None:
    """Check our answer against the reference, and the rival's roughly, so that it does the same work."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(M, size, generator=generator).bfloat16() for size in (shape.K, shape.N))
    layer = turns["nf4lora"]()
    A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    packed = layer.base_layer.op_arguments()
    y, S = reference.lora_linear(x, **packed, lora_A=A, lora_B=B, scaling=ALPHA / RANK)
    expected = (y,)
    if kind == "both":
        expected = reference.lora_linear_backward(dy, x, S, **packed, lora_A=A, lora_B=B, scaling=ALPHA / RANK)

    def answer(name: str) -> tuple[Tensor, ...]:
        result = CALLS[kind](turns[name], x, dy)
        return result if isinstance(result, tuple) else (result,)

    for number, (result, wanted) in enumerate(zip(answer("nf4lora"), expected, strict=True)):
        check_close(f"lora_linear {shape.name}, {kind} {number}", result, wanted, 2**-7)  # bf16: a last place of 2**-8
    if "bitsandbytes" in turns:
        for number, (result, wanted) in enumerate(zip(answer("bitsandbytes"), expected, strict=True)):
            check_close(f"bitsandbytes {shape.name}, {kind} {number}", result, wanted, 0.02)
