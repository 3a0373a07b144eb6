"""bounds: the parts of a layer's time on a CPU: decoding, pages of memory, the LoRA branch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nf4lora import NF4Linear, ops
from nf4lora.memory.pages import in_huge_pages

from ..harness.case import Absent, Settings, check_equal
from ..harness.contenders import ALPHA, RANK
from ..harness.layers import linear
from ..harness.shapes import QUICK, SHAPES, Shape, named
from ..harness.table import Table
from ..harness.timing import alternate, rotation

QUESTION = "What is a layer's time made of: decoding, pages of memory, the LoRA branch?"

TOKENS = (1, 2, 4, 8, 16)
BLOCK = 128  # weights that are decoded together
PAGED = named("Llama-2-7B gate, up", "Llama-3.1-8B q, o", "TinyLlama-1.1B down")


def run(settings: Settings) -> list[Table]:
    if settings.device != "cpu":
        raise Absent("these are bounds of the CPU's kernels")
    return [one_token(settings), decoding(settings), pages(settings), lora_branch(settings)]


def layer(shape: Shape, double_quant: bool = True) -> dict:
    weight = torch.randn(shape.N, shape.K).mul_(0.02).bfloat16()
    return NF4Linear.from_linear(linear(weight), double_quant=double_quant).op_arguments()


def loaded(made: dict) -> dict:
    """The layer with its codes read from a file, as from a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        save_file({"qweight": made["qweight"].data}, path)
        with safe_open(path, framework="pt") as file:
            return made | {"qweight": in_huge_pages(file.get_tensor("qweight"))}


def call(arguments: dict, x: Tensor, repeats: int = 1) -> Tensor:
    for _ in range(repeats):
        y = ops.lora_linear(x, **arguments)
    return y


def one_token(settings: Settings) -> Table:
    """One token beside torch's sum over the same number of bytes, with double quantisation and without it."""
    rows = []
    for shape in QUICK if settings.quick else PAGED:
        x = torch.randn(1, shape.K).bfloat16()
        calls: dict[str, Callable] = {}
        sizes = {}
        for name, double_quant in (("nested", True), ("float32", False)):
            made = layer(shape, double_quant)
            nbytes = sum(t.nbytes for t in made.values() if isinstance(t, Tensor))
            layers = rotation(lambda _, shape=shape, kind=double_quant: layer(shape, kind), nbytes)
            plain = rotation(lambda _, words=nbytes // 8: torch.ones(words, dtype=torch.int64), nbytes)
            calls[name] = lambda x=x, layers=layers: call(next(layers), x)
            calls[f"sum, {name}"] = lambda plain=plain: next(plain).sum()
            sizes[name] = nbytes
        took = alternate(calls, seconds=0.1 if settings.quick else 3.0)
        row: dict = {"layer": shape.name}
        for name, nbytes in sizes.items():
            row[f"{name}, ms"] = took[name].spread()
            row[f"{name}, GB/s"] = nbytes / took[name].median / 1e9
            row[f"sum / {name}"] = took[f"sum, {name}"].over(took[name])
        rows.append(row)
    return Table(
        "One token beside torch's sum over as many bytes, bf16",
        rows,
        [
            "nested: scales in 8 bits, as by default; float32: without double quantisation",
            "sum / nested, sum / float32: the time of torch's sum over as many bytes, over ours; above 1 is faster",
        ],
    )


def decoding(settings: Settings) -> Table:
    """The difference in time of two weights with different numbers of rows, both in a core's second cache level.

    The overhead of a call is in both times and cancels out.
    """
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
        files = rotation(lambda _, made=made: loaded(made), nbytes)
        check_equal("a copy", next(copies)["qweight"], made["qweight"])
        check_equal("a loaded weight", next(files)["qweight"], made["qweight"])
        for M in (1, 4):
            x = torch.randn(M, shape.K).bfloat16()
            calls = {
                "as packed": lambda x=x, packed=packed: call(next(packed), x),
                "loaded": lambda x=x, files=files: call(next(files), x),
                "copied": lambda x=x, copies=copies: call(next(copies), x),
            }
            took = alternate(calls, seconds=0.1 if settings.quick else 2.0)
            rows.append(
                {
                    "layer": shape.name,
                    "M": M,
                    "as packed, ms": took["as packed"].spread(),
                    "loaded, ms": took["loaded"].spread(),
                    "copied, ms": took["copied"].spread(),
                    "as packed / copied": took["as packed"].over(took["copied"]),
                    "loaded / copied": took["loaded"].over(took["copied"]),
                }
            )
    return Table(
        "Pages of 2 MB and of 4 KB under the packed weight",
        rows,
        [
            "as packed: nf4_quantize asks for pages of 2 MB; loaded: from a file, as a checkpoint is; copied: by "
            "torch's clone, which does not ask",
            "all are alike where /sys/kernel/mm/transparent_hugepage/enabled is not [madvise]",
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
