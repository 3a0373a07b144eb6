"""converge: whether training in 4 bits with nf4lora ends at the loss of bitsandbytes and of 16-bit LoRA."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

import nf4lora

from ..harness.case import Absent, Settings, without
from ..harness.contenders import EXACT, OURS, RIVAL, SIXTEEN, adapted
from ..harness.process import Process
from ..harness.table import Table

QUESTION = "After the same 60 steps from the same start, is the loss on held-out data that of PEFT + bitsandbytes?"

DATA = Path("examples/tickets")
BATCH, RATE, WARMUP, SEED = 8, 5e-4, 3, 0
EVALUATED = [0, 5, 20, 60]
TORCH = "torch.optim.AdamW"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    TORCH: torch.optim.AdamW,
    "PagedAdamW, 32 bits": nf4lora.PagedAdamW,
    "PagedAdamW, 8 bits": partial(nf4lora.PagedAdamW, bits=8),
}


def run(settings: Settings) -> list[Table]:
    folder = settings.folder()
    if not (DATA / "train.jsonl").is_file():
        raise Absent(f"no data in {DATA}: run this in the root of the repository")
    evaluated = [0, 1] if settings.quick else EVALUATED
    arguments = {"folder": folder.resolve(), "data": DATA.resolve(), "device": settings.device, "evaluated": evaluated}
    results: dict[str, dict] = {}
    for name in [OURS, *([] if without("bitsandbytes") else [RIVAL]), EXACT, SIXTEEN]:
        results[name] = trained(name=name, **arguments)
    last = {name: result["held_out"][-1] for name, result in results.items()}
    rows = []
    for name, result in results.items():
        row: dict = {"contender": name}
        row |= {
            f"held-out loss at {step}": f"{loss:.4f}" for step, loss in zip(evaluated, result["held_out"], strict=True)
        }
        row["beside bitsandbytes, %"] = 100 * (last[name] / last[RIVAL] - 1) if RIVAL in last else None
        row["training loss, last 10 steps"] = mean(result["losses"][-10:])
        rows.append(row)
    targets = []
    if RIVAL in last and not settings.quick:
        off = 100 * (last[OURS] / last[RIVAL] - 1)
        targets.append((f"held-out loss within 1 % of that of {RIVAL}, got {off:+.2f} %", abs(off) <= 1.0))
    return [
        Table(
            f"{settings.model.name} on {DATA}: {evaluated[-1]} steps of {BATCH} rows, loss on the answers only",
            rows,
            [
                f"AdamW, {RATE} with {WARMUP} steps of warm-up and a cosine, gradients clipped to 1; the same rows in "
                "the same order, the same lora_A; r = 16 on every linear layer, no dropout, bf16, adapters in float32",
                "the loss is the mean over all answer tokens of valid.jsonl",
                "PEFT rounds what an adapter adds to bf16 and adds it to an output already rounded to bf16: a change "
                "below half a last place is lost, which is most of it in the first steps. The fused op adds in float32 "
                "and rounds once, and follows the float32 run",
                *without("bitsandbytes"),
            ],
            targets,
        ),
    ]


def trained(**arguments) -> dict:
    """The losses of a contender, which runs in a process of its own."""
    with Process("converge", **arguments) as process:
        return next(process)


def contender(name: str, folder: str, data: str, device: str, evaluated: list[int], optimizer: str = TORCH):
    """Train to the last step of `evaluated`; yields the held-out losses after these steps and all training losses."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, valid = (encoded(Path(data) / f"{part}.jsonl", tokenizer) for part in ("train", "valid"))
    model = adapted(name, folder, device=device)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = OPTIMIZERS[optimizer](weights, lr=RATE, weight_decay=0.0)
    steps = evaluated[-1]
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: rate(step, steps))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED)).tolist()
    held_out, losses = [], []
    for step in range(steps + 1):
        if step in evaluated:
            held_out.append(held_out_loss(model, valid, device))
        if step == steps:
            break
        chosen = [train[order[(step * BATCH + i) % len(order)]] for i in range(BATCH)]
        loss = model(**padded(chosen, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        stepper.step()
        schedule.step()
        stepper.zero_grad()
        losses.append(loss.item())
    yield {"held_out": held_out, "losses": losses}


def rate(step: int, steps: int) -> float:
    """The factor of the learning rate at a step: it rises linearly, then falls along a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def encoded(path: Path, tokenizer) -> list[tuple[list[int], list[int]]]:
    """input_ids and labels of each conversation; the labels are the last answer and its end of turn."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        conversation = tokenizer.apply_chat_template(messages, tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = tokenizer(conversation, add_special_tokens=False).input_ids
        rows.append((ids, [-100] * start + ids[start:]))
    return rows


def padded(rows: list[tuple[list[int], list[int]]], device: str) -> dict[str, Tensor]:
    """A batch, padded on the right."""
    length = max(len(ids) for ids, _ in rows)

    def filled(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (length - len(row)) for row in values], device=device)

    return {
        "input_ids": filled([ids for ids, _ in rows], 0),
        "labels": filled([labels for _, labels in rows], -100),
        "attention_mask": filled([[1] * len(ids) for ids, _ in rows], 0),
    }


@torch.no_grad()
def held_out_loss(model, rows: list[tuple[list[int], list[int]]], device: str) -> float:
    """The mean loss over all labelled tokens.

    The model stays in training mode, because bitsandbytes' layers on a CPU give no gradient to their input after they
    have run in evaluation mode. Without dropout the mode makes no other difference.
    """
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = padded(rows[start : start + BATCH], device)
        trained = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * trained
        count += trained
    return total / count
