"""generate: tokens a second of a real model that generates 1, 4 and 16 texts at once, with an adapter and without."""

from __future__ import annotations

import time

import torch

from ..harness.case import Settings, WrongAnswer, without
from ..harness.contenders import OURS, RANK, RIVAL, SIXTEEN, adapted, load
from ..harness.process import Process
from ..harness.prose import windows
from ..harness.table import Table
from ..harness.timing import Timing

QUESTION = "How fast are 1, 4 and 16 texts generated, beside the 16-bit model and beside bitsandbytes?"

BATCHES = (1, 4, 16)
PROMPT, ANSWER = 16, 64  # tokens
NAMES = {SIXTEEN: "not quantised", OURS: "nf4lora", RIVAL: "bitsandbytes"}
LEAST = 1.5  # target on a CPU: speed over that of the 16-bit model, for one text
LEAST_ADAPTED = 1.0  # target on a CPU: speed with an adapter over that of the 16-bit model without, for 16 texts


def run(settings: Settings) -> list[Table]:
    folder = settings.folder().resolve()
    loads = [SIXTEEN, OURS, *([] if without("bitsandbytes") else [RIVAL])]
    names = [(load, adapter) for load in loads for adapter in (False, True)]
    answer, rounds = (4, 1) if settings.quick else (ANSWER, 5)
    shared = {"folder": folder, "device": settings.device, "answer": answer}
    open_ = [Process("generate", name=load, adapter=adapter, **shared) for load, adapter in names]
    took: dict[tuple[str, bool, int], list[float]] = {(*name, batch): [] for batch in BATCHES for name in names}
    try:
        for number in range(-1, rounds):  # the first warms up
            turn = list(zip(names, open_, strict=True))
            for batch in BATCHES:  # every contender yields its batches in this order
                for name, process in turn if number % 2 else reversed(turn):
                    result = next(process)
                    if result["batch"] != batch or result["tokens"] != batch * answer:
                        raise WrongAnswer(f"{name} wrote {result['tokens']} tokens, not {batch} times {answer}")
                    if number >= 0:
                        took[(*name, batch)].append(result["seconds"])
    finally:
        for process in open_:
            process.__exit__()
    timings = {name: Timing(seconds) for name, seconds in took.items()}
    return [table(settings, timings, answer)]


def table(settings: Settings, timings: dict[tuple[str, bool, int], Timing], answer: int) -> Table:
    rows = [
        {
            "texts": batch,
            "contender": NAMES[name] + (", adapter" if adapter else ""),
            "tokens/s": batch * answer / timing.median,
            "times the 16-bit model's without adapter": timings[SIXTEEN, False, batch].over(timing),
        }
        for (name, adapter, batch), timing in timings.items()
    ]
    targets = []
    if settings.device == "cpu" and not settings.quick:
        one = timings[SIXTEEN, False, 1].over(timings[OURS, False, 1])["median"]
        many = timings[SIXTEEN, False, 16].over(timings[OURS, True, 16])["median"]
        targets = [
            (f"one text at {LEAST} times the speed of the 16-bit model at least, got {one:.2f}", one >= LEAST),
            (
                f"16 texts with an adapter at {LEAST_ADAPTED} times the speed of the 16-bit model without "
                f"at least, got {many:.2f}",
                many >= LEAST_ADAPTED,
            ),
        ]
    return Table(
        f"{settings.model.name}, {answer} tokens each, greedily, bf16",
        rows,
        [
            "model.generate of transformers, with its cache; each contender in a process of its own, in turns",
            f"prompts of {PROMPT} tokens; adapter: LoRA of rank {RANK} on every linear layer, in float32, with PEFT",
            *without("bitsandbytes"),
        ],
        targets,
    )


@torch.no_grad()
def contender(name: str, adapter: bool, folder: str, device: str, answer: int):
    prompts = windows(folder, PROMPT).to(device)
    if adapter:
        model = adapted(name, folder, device=device)
        model.config.use_cache = True
    else:
        model = load(name, folder, device)
    model.eval()
    options = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False, "pad_token_id": 0}
    while True:
        for batch in BATCHES:
            ids = prompts[:batch]
            start = time.perf_counter()
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            seconds = time.perf_counter() - start
            yield {"seconds": seconds, "tokens": output[:, PROMPT:].numel(), "batch": batch}
