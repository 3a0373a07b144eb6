"""train: the time and memory of one QLoRA step on a real model."""

from __future__ import annotations

import time
from itertools import cycle

import torch

from ..harness.case import Settings, WrongAnswer, without
from ..harness.contenders import IN_BF16, KBIT, OURS, RIVAL, SIXTEEN, adapted
from ..harness.process import Process, forget_peak, peak_bytes
from ..harness.prose import batches
from ..harness.table import Table
from ..harness.timing import Timing

QUESTION = "What does a training step cost in time and memory beside PEFT + bitsandbytes and beside 16-bit LoRA?"

BATCH, LENGTH, STEPS = 4, 256, 5
MB = 1e6


def run(settings: Settings) -> list[Table]:
    settings.folder()  # raises if there is no model, before any process starts
    batch, length, steps = (2, 32, 2) if settings.quick else (BATCH, LENGTH, STEPS)
    rivals = [SIXTEEN] if without("bitsandbytes") else [RIVAL, KBIT, IN_BF16, SIXTEEN]
    rivals = rivals[: 1 if settings.quick else None]
    tables = []
    for checkpointing in (False, True):
        rows = []
        for rival in rivals:
            options = (settings, checkpointing, batch, length)
            with process(OURS, *options) as ours, process(rival, *options) as other:
                rows.append(row(rival, *taking_turns(ours, other, steps), tokens=batch * length))
        tables.append(table(settings, rows, checkpointing, batch, length, steps))
    return tables


def process(name: str, settings: Settings, checkpointing: bool, batch: int, length: int) -> Process:
    folder = settings.folder().resolve()
    sizes = {"batch": batch, "length": length}
    return Process("train", name=name, folder=folder, checkpointing=checkpointing, device=settings.device, **sizes)


def taking_turns(ours: Process, rival: Process, steps: int) -> tuple[list[dict], list[dict]]:
    """The results of each side for each step, without the first step, which warms up and whose losses are compared."""
    first = next(ours), next(rival)
    if not abs(first[0]["loss"] / first[1]["loss"] - 1) < 0.2:  # 4 bits are not 16, but it is the same batch
        raise WrongAnswer(f"loss of the first step: {ours.name} {first[0]['loss']}, {rival.name} {first[1]['loss']}")
    answers: tuple[list[dict], list[dict]] = [], []
    for number in range(steps):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            answers[index].append(next((ours, rival)[index]))
    return answers


def row(rival: str, our_steps: list[dict], rivals_steps: list[dict], tokens: int) -> dict:
    ours, other = (Timing([step["seconds"] for step in steps]) for steps in (our_steps, rivals_steps))
    peak, rivals_peak = (max(step["peak"] for step in steps) for steps in (our_steps, rivals_steps))
    return {
        "rival": rival,
        "rival, s": other.spread(1),
        "ours, s": ours.spread(1),
        "time, ours / rival": ours.over(other),
        "rival's peak, MB": rivals_peak / MB,
        "our peak, MB": peak / MB,
        "peak, ours / rival": peak / rivals_peak,
        "rival, tokens/s": tokens / other.median,
        "ours, tokens/s": tokens / ours.median,
    }


def table(settings: Settings, rows: list[dict], checkpointing: bool, batch: int, length: int, steps: int) -> Table:
    targets = []
    if rows[0]["rival"] == RIVAL and not settings.quick:
        most = (1.0, 1.0) if checkpointing else (0.5, 0.4)
        targets = [
            limit(rows, RIVAL, f"{quantity}, ours / rival", share) for quantity, share in zip(("time", "peak"), most)
        ]
        targets.append(limit(rows, SIXTEEN, "time, ours / rival", 1.0))
    return Table(
        f"A step of {settings.model.name}, {batch} x {length} tokens, r = 16 on every linear layer, "
        + ("with gradient checkpointing (non-reentrant)" if checkpointing else "no gradient checkpointing"),
        rows,
        [
            "a step: forward with labels, backward, torch.optim.AdamW, in a plain loop without autocast; bf16, NF4 "
            "with double quantisation; adapters in float32 but where a row says otherwise",
            f"each rival beside us: two fresh processes that take turns, {steps} steps each after one to warm up",
            f"{KBIT}: it also turns embeddings, norms and head to float32",
            "peak: resident memory (on a GPU: allocated), from the first step on, Python and its libraries included",
            *without("bitsandbytes"),
        ],
        targets,
    )


def limit(rows: list[dict], rival: str, key: str, most: float) -> tuple[str, bool]:
    """The target that our value is at most `most` times the rival's."""
    cell = next(row for row in rows if row["rival"] == rival)[key]
    value = cell["median"] if isinstance(cell, dict) else cell
    return f"{key.partition(',')[0]} at most {most} of {rival}'s, got {value:.2f}", value <= most


def contender(name: str, folder: str, checkpointing: bool, device: str, batch: int, length: int):
    model = adapted(name, folder, checkpointing, device)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    forget_peak(device)
    for ids in cycle(batches(folder, batch, length)):
        ids = ids.to(device)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()  # on a GPU, waits for the loss; then for the optimizer:
        if device == "cuda":
            torch.cuda.synchronize()
        yield {"seconds": time.perf_counter() - start, "loss": value, "peak": peak_bytes(device)}
