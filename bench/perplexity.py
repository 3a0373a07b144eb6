"""perplexity: whether a model quantised by us predicts text as well as one quantised by bitsandbytes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .case import Settings, without
from .contenders import OURS, RIVAL, SIXTEEN, load
from .process import Process
from .prose import windows
from .table import Table

QUESTION = "Does a model in NF4 predict text as well as with bitsandbytes' NF4, and how far from 16 bits?"

REPACKED = "bitsandbytes + PEFT, repacked for evaluation"


def run(settings: Settings) -> list[Table]:
    folder = settings.folder()
    contenders = [SIXTEEN, OURS, *([] if without("bitsandbytes") else [RIVAL, REPACKED])]
    found: dict[str, dict] = {}
    for name in contenders:
        with Process("perplexity", name=name, folder=folder, device=settings.device, quick=settings.quick) as process:
            found[name] = next(process)
    rows = [
        {
            "contender": name.replace(" + PEFT", "").replace(" LoRA", ""),
            "perplexity": f"{each['perplexity']:.4f}",
            "beside bf16, %": 100 * (each["perplexity"] / found[SIXTEEN]["perplexity"] - 1),
            "beside bitsandbytes, %": 100 * (each["perplexity"] / found[RIVAL]["perplexity"] - 1)
            if RIVAL in found
            else None,
        }
        for name, each in found.items()
    ]
    targets = []
    if RIVAL in found:
        off = 100 * abs(found[OURS]["perplexity"] / found[RIVAL]["perplexity"] - 1)
        targets.append((f"within 0.1 % of bitsandbytes, got {off:.3f} %", off <= 0.1))
    tokens, length = found[OURS]["tokens"], found[OURS]["length"]
    return [
        Table(
            f"{settings.model.name} on bench/text.txt, {tokens} predictions in windows of {length} tokens",
            rows,
            [
                "NF4 with double quantisation in every linear layer but the head; bf16 arithmetic; no adapters",
                "bitsandbytes: its layers in training mode, as they are trained; in evaluation, on a CPU with "
                "AVX512-BF16, it repacks them first, with scales rounded to bf16",
                "SmolLM2's weights come from a 4-bit GGUF file, so this is their second quantisation: the step from "
                "bf16 says little about NF4 in general",
                *without("bitsandbytes"),
            ],
            targets,
        )
    ]


def contender(name: str, folder: str, device: str, quick: bool):
    model = load(RIVAL if name == REPACKED else name, folder, device)
    model.train(name != REPACKED)  # no dropout in these models: it decides on bitsandbytes' path alone
    length = 64 if quick else 512
    nll, count = 0.0, 0
    with torch.no_grad():
        for ids in windows(folder, length)[: 2 if quick else None]:
            ids = ids.to(device)
            logits = model(ids[None]).logits[0, :-1].float()
            nll += F.cross_entropy(logits, ids[1:], reduction="sum").double().item()
            count += len(ids) - 1
    yield {"perplexity": math.exp(nll / count), "tokens": count, "length": length}
