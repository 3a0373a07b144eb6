"""optimizers: whether training with PagedAdamW ends at the loss of training with torch's AdamW."""

from __future__ import annotations

from statistics import mean

from ..harness.case import Absent, Settings
from ..harness.contenders import OURS
from ..harness.table import Table
from .converge import DATA, EVALUATED, OPTIMIZERS, TORCH, trained

QUESTION = "After the same 60 steps, is the loss on held-out data with PagedAdamW that with torch's AdamW?"


def run(settings: Settings) -> list[Table]:
    folder = settings.folder()
    if not (DATA / "train.jsonl").is_file():
        raise Absent(f"no data in {DATA}: run this in the root of the repository")
    evaluated = [0, 1] if settings.quick else EVALUATED
    arguments = {"folder": folder.resolve(), "data": DATA.resolve(), "device": settings.device, "evaluated": evaluated}
    results = {name: trained(name=OURS, optimizer=name, **arguments) for name in OPTIMIZERS}
    rows, targets = [], []
    for name, result in results.items():
        off = 100 * (result["held_out"][-1] / results[TORCH]["held_out"][-1] - 1)
        losses = zip(evaluated, result["held_out"], strict=True)
        rows.append(
            {"optimizer": name}
            | {f"held-out loss at {step}": f"{loss:.4f}" for step, loss in losses}
            | {"beside torch's, %": off, "training loss, last 10 steps": mean(result["losses"][-10:])}
        )
        if name != TORCH and not settings.quick:
            targets.append(
                (f"{name}: held-out loss within 0.5 % of that of {TORCH}, got {off:+.2f} %", abs(off) <= 0.5)
            )
    return [
        Table(
            f"{settings.model.name} on {DATA}: {evaluated[-1]} steps of the case converge with another optimizer",
            rows,
            ["the moments of 8 bits are rounded after every step; nothing else differs"],
            targets,
        )
    ]
