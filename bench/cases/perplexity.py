"""perplexity: whether a model quantised by nf4lora predicts text as well as one quantised by bitsandbytes."""

from __future__ import annotations

import math
from statistics import mean, stdev

import torch
import torch.nn.functional as F

from ..harness.case import Settings, without
from ..harness.contenders import OURS, RIVAL, SIXTEEN, load
from ..harness.process import Process
from ..harness.prose import windows
from ..harness.table import Table

QUESTION = "Does a model in NF4 predict text as well as with bitsandbytes' NF4, and how far from 16 bits?"

REPACKED = "bitsandbytes + PEFT, repacked for evaluation"
DTYPES = (torch.bfloat16, torch.float32)


def run(settings: Settings) -> list[Table]:
    folder = settings.folder()
    contenders = [SIXTEEN, OURS, *([] if without("bitsandbytes") else [RIVAL, REPACKED])]
    results: dict[str, dict[str, list[float]]] = {}
    for name in contenders:
        with Process("perplexity", name=name, folder=folder, device=settings.device, quick=settings.quick) as process:
            results[name] = next(process)
    rows, targets = [row(name, results) for name in results], []
    if RIVAL in results and not settings.quick:
        off = abs(beside(results[OURS]["float32"], results[RIVAL]["float32"])[0])
        targets.append((f"within 0.1 % of bitsandbytes in float32 arithmetic, got {off:.4f} %", off <= 0.1))
    return [
        Table(
            f"{settings.model.name} on bench/harness/text.txt, {len(results[OURS]['float32'])} predictions",
            rows,
            [
                f"windows of {length(settings.quick)} tokens that do not overlap; NF4 with double quantisation in "
                "every linear layer but the head; no adapters; behind a +- the standard error of the difference",
                "in bf16 the order of summation alone moves the result by about that error, with equal weights",
                "bitsandbytes: its layers in training mode, as they are trained; in evaluation, on a CPU with "
                "AVX512-BF16, it repacks them first, with scales rounded to bf16",
                "SmolLM2's weights come from a 4-bit GGUF file, so this is their second quantisation: the step from "
                "16 bits says little about NF4 in general",
                *without("bitsandbytes"),
            ],
            targets,
        )
    ]


def row(name: str, results: dict[str, dict[str, list[float]]]) -> dict:
    def difference(other: str, dtype: str) -> str | None:
        if other not in results or other == name:
            return None
        return "{:+.3f} +- {:.3f}".format(*beside(results[name][dtype], results[other][dtype]))

    cells: dict = {"contender": name.replace(" + PEFT", "").replace(SIXTEEN, "not quantised")}
    for dtype, losses in results[name].items():
        cells[f"perplexity, {dtype}"] = f"{math.exp(mean(losses)):.4f}"
        cells[f"beside bitsandbytes, {dtype}, %"] = difference(RIVAL, dtype)
    return cells | {"beside 16 bits, bfloat16, %": difference(SIXTEEN, "bfloat16")}


def beside(first: list[float], second: list[float]) -> tuple[float, float]:
    """The difference of two perplexities and its standard error, in per cent."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return 100 * math.expm1(mean(differences)), 100 * stdev(differences) / math.sqrt(len(differences))


def length(quick: bool) -> int:
    return 64 if quick else 512


def contender(name: str, folder: str, device: str, quick: bool):
    """The loss of every prediction, computed in bf16 and in float32."""
    yield {str(dtype).removeprefix("torch."): losses(name, folder, device, quick, dtype) for dtype in DTYPES}


@torch.no_grad()
def losses(name: str, folder: str, device: str, quick: bool, dtype: torch.dtype) -> list[float]:
    model = load(RIVAL if name == REPACKED else name, folder, device, dtype)
    model.train(name != REPACKED)  # without dropout the mode only selects bitsandbytes' kernel
    values = []
    for ids in windows(folder, length(quick))[: 2 if quick else None].to(device):
        logits = model(ids[None]).logits[0, :-1].float()
        values += F.cross_entropy(logits, ids[1:], reduction="none").tolist()
    return values
