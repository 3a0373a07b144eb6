"""soak: whether memory and speed stay constant in a long run with batches of changing length."""

from __future__ import annotations

import random
import time
from statistics import median

import torch

from ..harness.case import Settings, without
from ..harness.contenders import OURS, RIVAL, adapted
from ..harness.process import Process, forget_peak, peak_bytes, status
from ..harness.prose import tokens
from ..harness.table import Table

QUESTION = "Does a run of 1,000 steps of changing length hold its memory and its speed?"

BATCH, SHORTEST, LONGEST = 4, 60, 170
STEPS, OTHERS = 1000, 100  # our steps; the steps of the others, whose memory grows in the first ones
PERIOD, SETTLED = 50, 200  # steps in a row of the table; the step from which on nothing may grow
FEW = 10  # steps of the run with batches of the longest length only
ALONE = "the longest batch alone"
LEFT_ALONE = "nf4lora, nothing returned"  # without heap.py and onednn.py, to measure their effect
# oneDNN's own sizes of its caches
HELD = {LEFT_ALONE: {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}}
MB = 1e6
MOST_GROWTH, MOST_SLOWDOWN, MOST_PEAK = 0.02, 0.03, 1.15


def run(settings: Settings) -> list[Table]:
    folder = settings.folder().resolve()
    steps, others, period, few = (4, 2, 2, 2) if settings.quick else (STEPS, OTHERS, PERIOD, FEW)
    names = [OURS, LEFT_ALONE, *([] if without("bitsandbytes") else [RIVAL])]
    options = {"folder": folder, "device": settings.device, "steps": period}
    alone = {}
    for name in names:  # one after the other, since they would change each other's peaks
        with Process("soak", HELD.get(name), name=name, shortest=LONGEST, **options | {"steps": few}) as process:
            alone[name] = next(process)["peak"]
    open_ = [Process("soak", HELD.get(name), name=name, shortest=SHORTEST, **options) for name in names]
    records: dict[str, list[dict]] = {name: [] for name in names}
    try:
        for number in range(steps // period):
            going_on = number * period < others
            turn = [both for both in zip(names, open_, strict=True) if both[0] == OURS or going_on]
            for name, process in turn if number % 2 else reversed(turn):
                records[name].append(next(process))
    finally:
        for process in open_:
            process.__exit__()
    return [course(settings, records, period), summary(settings, records, alone, period)]


def course(settings: Settings, records: dict[str, list[dict]], period: int) -> Table:
    """The table of memory and speed by step."""
    rows = []
    for number in range(len(next(iter(records.values())))):
        row: dict = {"steps": (number + 1) * period}
        for name, parts in records.items():
            part = parts[number] if number < len(parts) else None
            row[f"{name}, MB"] = part and part["resident"] / MB
            row[f"{name}, tokens/s"] = part and part["tokens"] / part["seconds"]
        rows.append(row)
    notes = [
        f"{settings.model.name}, LoRA of rank 16 on every linear layer, torch.optim.AdamW, a plain loop",
        f"batches of {BATCH} x {SHORTEST} to {LONGEST} tokens, the same for all; {period} steps each in turn",
        "MB: largest resident memory between the steps of a row, Python and its libraries included",
        *without("bitsandbytes"),
    ]
    return Table("Memory between steps, and speed", rows, notes)


def summary(settings: Settings, records: dict[str, list[dict]], alone: dict[str, int], period: int) -> Table:
    """The table of changes between the step SETTLED and the end."""
    rows = []
    for name, parts in records.items():
        settled = parts[max(SETTLED // period - 1, 0) :]  # of the others none
        pace = [part["tokens"] / part["seconds"] for part in settled]
        half = max(len(pace) // 2, 1)
        rows.append(
            {
                "contender": name,
                "steps": len(parts) * period,
                "memory, growth, %": 100 * (settled[-1]["resident"] / settled[0]["resident"] - 1) if pace else None,
                "speed, loss, %": 100 * (1 - median(pace[-half:]) / median(pace[:half])) if pace else None,
                "highest peak, MB": max(part["peak"] for part in parts) / MB,
                f"{ALONE}, MB": alone[name] / MB,
                "peak / alone": max(part["peak"] for part in parts) / alone[name],
                "trimming, % of the time": 100 * sum(part["trimming"] for part in parts)
                / sum(part["seconds"] for part in parts),
            }
        )  # fmt: skip
    targets = []
    if not settings.quick and settings.device == "cpu":
        growth, slowdown, peak = (rows[0][key] for key in ("memory, growth, %", "speed, loss, %", "peak / alone"))
        targets = [
            (f"memory grows by less than {MOST_GROWTH:.0%} from step {SETTLED} on, got {growth:.1f} %", growth < 2),
            (
                f"speed falls by less than {MOST_SLOWDOWN:.0%} from step {SETTLED} on, got {slowdown:.1f} %",
                slowdown < 3,
            ),
            (f"peak at most {MOST_PEAK} of the longest batch alone, got {peak:.2f}", peak <= MOST_PEAK),
        ]
    return Table(
        f"From step {SETTLED} on",
        rows,
        [
            "growth: of resident memory between steps; loss of speed: median of the second half over that of the first",
            f"{ALONE}: {BATCH} x {LONGEST} tokens, a few steps, nothing else before it",
            "trimming: the calls that give free pieces of the heap back to the system",
            f"{LEFT_ALONE}: no trimming, and oneDNN's caches as large as they are by themselves",
        ],
        targets,
    )


def contender(name: str, folder: str, device: str, shortest: int, steps: int):
    heap = None
    if name != RIVAL:
        from nf4lora.memory import heap
    model = adapted(RIVAL if name == RIVAL else OURS, folder, device=device)
    if name == LEFT_ALONE:
        heap.enabled = False
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    text, draw = tokens(folder), random.Random(0)
    forget_peak(device)
    while True:
        count, resident, trimming, start = 0, 0, heap.seconds if heap else 0.0, time.perf_counter()
        for _ in range(steps):
            length = draw.randint(shortest, LONGEST)
            begins = [draw.randrange(len(text) - length) for _ in range(BATCH)]
            ids = torch.stack([text[at : at + length] for at in begins]).to(device)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            count += ids.numel()
            resident = max(resident, status("self", "VmRSS"))
        yield {
            "seconds": time.perf_counter() - start,
            "tokens": count,
            "resident": resident,
            "peak": peak_bytes(device),
            "trimming": (heap.seconds if heap else 0.0) - trimming,
        }
