"""generate: tokens a second of a real model that writes one text."""

from __future__ import annotations

import time

import torch

from .case import Settings, WrongAnswer, without
from .contenders import OURS, RIVAL, SIXTEEN, adapted, load
from .process import Process
from .table import Table
from .timing import Timing

QUESTION = "How fast is a text generated, beside the 16-bit model and beside bitsandbytes?"

PREPARED = "nf4lora, prepared"  # with an adapter of rank 16 on every linear layer
ADAPTED = "bitsandbytes + PEFT, adapted"
PROMPT = "The history of the bicycle begins with"
LEAST = 1.5  # times as fast as the 16-bit model, on a CPU


def run(settings: Settings) -> list[Table]:
    folder = settings.folder().resolve()
    names = [SIXTEEN, OURS, PREPARED, *([] if without("bitsandbytes") else [RIVAL, ADAPTED])]
    tokens, rounds = (4, 1) if settings.quick else (64, 7)
    took: dict[str, list[float]] = {name: [] for name in names}
    open_ = [Process("generate", name=name, folder=folder, device=settings.device, tokens=tokens) for name in names]
    try:
        for number in range(-1, rounds):  # the first warms up
            turn = list(zip(names, open_, strict=True))
            for name, process in turn if number % 2 else reversed(turn):
                answer = next(process)
                if answer["tokens"] != tokens:
                    raise WrongAnswer(f"{name} wrote {answer['tokens']} tokens, {tokens} were asked for")
                if number >= 0:
                    took[name].append(answer["seconds"])
    finally:
        for process in open_:
            process.__exit__()
    timings = {name: Timing(seconds) for name, seconds in took.items()}
    rows = [
        {
            "contender": name.replace(SIXTEEN, "not quantised"),
            "tokens/s": tokens / timing.median,
            "times the 16-bit model's": timings[SIXTEEN].over(timing),
        }
        for name, timing in timings.items()
    ]
    targets = []
    if settings.device == "cpu" and not settings.quick:
        found = rows[1]["times the 16-bit model's"]["median"]
        targets.append((f"at least {LEAST} times the speed of the 16-bit model, got {found:.2f}", found >= LEAST))
    return [
        Table(
            f"{settings.model.name}, {tokens} tokens, greedily, one text, bf16",
            rows,
            [
                "model.generate of transformers, with its cache; each contender in a process of its own, in turns",
                "prepared, adapted: with LoRA of rank 16 on every linear layer",
                *without("bitsandbytes"),
            ],
            targets,
        )
    ]


@torch.no_grad()
def contender(name: str, folder: str, device: str, tokens: int):
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").to(device)
    if name in (PREPARED, ADAPTED):
        model = adapted(OURS if name == PREPARED else RIVAL, folder, device=device)
        model.config.use_cache = True
    else:
        model = load(name, folder, device)
    model.eval()
    while True:
        start = time.perf_counter()
        found = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        yield {"seconds": time.perf_counter() - start, "tokens": found.shape[1] - inputs["input_ids"].shape[1]}
