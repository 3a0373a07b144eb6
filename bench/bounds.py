"""bounds: what a layer's time on a CPU is made of: decoding, pages of memory, the LoRA branch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nf4lora import NF4Linear, ops

from .case import Absent, Settings, check_equal
from .contenders import ALPHA, RANK
from .layers import linear
from .shapes import QUICK, SHAPES, Shape, named
from .table import Table
from .timing import alternate, rotation

QUESTION = "What is a layer's time made of: decoding, pages of memory, the LoRA branch?"

TOKENS = (1, 2, 4, 8, 16)
BLOCK = 128  # weights that are decoded together
PAGED = named("Llama-2-7B gate, up", "Llama-3.1-8B q, o", "TinyLlama-1.1B down")


def run(settings: Settings) -> list[Table]:
    if settings.device != "cpu":
        raise Absent("these are bounds of the CPU's kernels")
    return [decoding(settings), pages(settings), lora_branch(settings)]


def layer(shape: Shape) -> dict:
    weight = torch.randn(shape.N, shape.K).mul_(0.02).bfloat16()
    return NF4Linear.from_linear(linear(weight)).op_arguments()


def call(arguments: dict, x: Tensor, repeats: int = 1) -> Tensor:
    for _ in range(repeats):
        y = ops.lora_linear(x, **arguments)
    return y


def decoding(settings: Settings) -> Table:
    """Two weights of different height that a core's second cache level holds: their difference has no overhead."""
    small, large, K, repeats = 64, 256, 4096, 2 if settings.quick else 20
    layers = {N: layer(Shape("", "", N, K)) for N in (small, large)}
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for M in TOKENS:
            x = torch.randn(M, K).bfloat16()
            calls: dict[str, Callable] = {str(N): partial(call, layers[N], x, repeats) for N in layers}
            took = alternate(calls, seconds=0.1 if settings.quick else 1.0)
            seconds = (took[str(large)].median - took[str(small)].median) / repeats
            blocks = (large - small) * K / BLOCK
            rows.append(
                {
                    "M": M,
                    f"ns per {BLOCK} weights": seconds / blocks * 1e9,
                    "Gweights/s": blocks * BLOCK / seconds / 1e9,
                    "GFLOP/s": 2 * M * blocks * BLOCK / seconds / 1e9,
                }
            )
    finally:
        torch.set_num_threads(threads)
    return Table(
        "Few tokens on one thread, the weight in the second cache level, bf16",
        rows,
        [f"the time of {large} rows of {K} less that of {small}: decoded and multiplied, nothing else"],
    )


def pages(settings: Settings) -> Table:
    rows = []
    for shape in QUICK if settings.quick else PAGED:
        made = layer(shape)
        nbytes = made["qweight"].nbytes + made["absmax"].nbytes
        packed = rotation(lambda _, shape=shape: layer(shape), nbytes)
        copies = rotation(lambda _, made=made: made | {"qweight": made["qweight"].clone()}, nbytes)
        check_equal("a copy", next(copies)["qweight"], made["qweight"])
        for M in (1, 4):
            x = torch.randn(M, shape.K).bfloat16()
            calls = {
                "as packed": lambda x=x, packed=packed: call(next(packed), x),
                "copied": lambda x=x, copies=copies: call(next(copies), x),
            }
            took = alternate(calls, seconds=0.1 if settings.quick else 2.0)
            rows.append(
                {
                    "layer": shape.name,
                    "M": M,
                    "as packed, ms": took["as packed"].spread(),
                    "copied, ms": took["copied"].spread(),
                    "as packed / copied": took["as packed"].over(took["copied"]),
                }
            )
    return Table(
        "Pages of 2 MB and of 4 KB under the packed weight",
        rows,
        [
            "as packed: nf4_quantize asks for pages of 2 MB; copied: by torch's clone, which does not ask",
            "both are alike where /sys/kernel/mm/transparent_hugepage/enabled is not [madvise]",
        ],
    )


def lora_branch(settings: Settings) -> Table:
    rows = []
    M = 16 if settings.quick else 1024
    for shape in QUICK if settings.quick else (*SHAPES[:4], *named("Llama-3.1-8B q, o")):
        base = layer(shape)
        lora = {"lora_A": torch.randn(RANK, shape.K), "lora_B": torch.randn(shape.N, RANK), "scaling": ALPHA / RANK}
        x = torch.randn(M, shape.K).bfloat16()
        calls = {
            "with": lambda base=base, lora=lora, x=x: call(base | lora, x),
            "without": lambda base=base, x=x: call(base, x),
        }
        took = alternate(calls, seconds=0.1 if settings.quick else 2.0)
        rows.append(
            {
                "layer": shape.name,
                "with LoRA, ms": took["with"].spread(),
                "without, ms": took["without"].spread(),
                "with / without": took["with"].over(took["without"]),
            }
        )
    return Table(
        f"What rank {RANK} adds to the forward pass of {M} tokens, bf16",
        rows,
        ["of which the low-rank product with lora_A, which layers with the same input could share, is a part"],
    )
