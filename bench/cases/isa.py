"""isa: the speed on processors without AVX512-BF16, measured by limiting both sides to an older instruction set."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from nf4lora import NF4Linear, build_info
from nf4lora.ops import reference

from ..harness.case import Absent, Settings, check_close
from ..harness.contenders import ALPHA, RANK
from ..harness.layers import CALLS, linear, with_lora
from ..harness.process import Process
from ..harness.shapes import QUICK, named
from ..harness.table import Table
from ..harness.timing import alternate

QUESTION = "How fast is a layer on a processor with AVX2, or with AVX-512 but no BF16, beside torch held to the same?"

AVX2 = {"NF4LORA_CPU": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX512 = {"NF4LORA_CPU": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
# The instruction set of both sides, the dtype, and the target for our time over torch's with 512 tokens, forward. The
# rows without a target show the cost of bfloat16 computed by float32 instructions, by which `nf4lora train` chooses a
# dtype.
HELD: dict[str, tuple[dict[str, str], str, float | None]] = {
    "avx2, float32": (AVX2, "float32", 0.9),
    "avx2, bfloat16": (AVX2, "bfloat16", None),
    "avx512, float32": (AVX512, "float32", None),
    "avx512, bfloat16": (AVX512, "bfloat16", 1.0),
}
SHAPE = named("Llama-3.1-8B q, o")[0]
TOKENS = (1, 16, 512)


def run(settings: Settings) -> list[Table]:
    if settings.device != "cpu":
        raise Absent("a GPU has one instruction set")
    rows, targets = [], []
    for name, (environment, dtype, limit) in HELD.items():
        if environment["NF4LORA_CPU"] not in build_info()["cpu_available"]:
            continue
        with Process("isa", environment, dtype=dtype, quick=settings.quick) as process:
            for cells in next(process)["rows"]:
                rows.append({"held to": name, **cells})
                timed = not settings.quick and cells["M"] == TOKENS[-1] and cells["pass"] == "forward"
                if timed and limit is not None:
                    ratio = cells["ours / torch"]["median"]
                    claim = f"{name}, {cells['M']} tokens: at most {limit} of torch's time, got {ratio:.2f}"
                    targets.append((claim, ratio <= limit))
    shape = QUICK[0] if settings.quick else SHAPE
    notes = [
        "torch: F.linear and its dx, without LoRA; ours with LoRA of rank 16, in both with its gradients",
        "held: by NF4LORA_CPU, ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA, as their authors meant them",
    ]
    return [Table(f"{shape.name}, both sides held to an older instruction set", rows, notes, targets)]


def contender(dtype: str, quick: bool):
    shape, kind = QUICK[0] if quick else SHAPE, getattr(torch, dtype)
    weight = torch.randn(shape.N, shape.K).mul_(0.02).to(kind)
    layer, frozen = with_lora(NF4Linear.from_linear(linear(weight))), linear(weight)
    x = torch.randn(8, shape.K, dtype=kind)
    A, B = (adapter["default"].weight.data for adapter in (layer.lora_A, layer.lora_B))
    arguments = layer.base_layer.op_arguments()
    expected, _ = reference.lora_linear(x, **arguments, lora_A=A, lora_B=B, scaling=ALPHA / RANK)
    # float32: sums of 4,096 terms in another order; bfloat16: a last place, 2^-7 of a value just above a power of two.
    check_close("lora_linear", layer(x), expected, 2**-16 if kind is torch.float32 else 2**-7)
    rows: list[dict[str, Any]] = []
    for M in (1, 16) if quick else TOKENS:
        x, dy = torch.randn(M, shape.K, dtype=kind), torch.randn(M, shape.N, dtype=kind)
        for direction, call in CALLS.items():
            turns = {"ours": partial(call, lambda: layer, x, dy), "torch": partial(call, lambda: frozen, x, dy)}
            took = alternate(turns, seconds=0.1 if quick else 3.0, most=100)
            rows.append(
                {
                    "pass": direction,
                    "M": M,
                    "ours, ms": took["ours"].spread(),
                    "torch, ms": took["torch"].spread(),
                    "ours / torch": took["ours"].over(took["torch"]),
                }
            )
    yield {"rows": rows}
