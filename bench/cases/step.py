"""step: the time of our training step by operator, and its memory; on a GPU, steps of large random models as well."""

from __future__ import annotations

import contextlib
from itertools import cycle

import torch

from ..harness.case import Absent, Settings
from ..harness.contenders import OURS, adapted
from ..harness.process import Process, forget_peak, peak_bytes
from ..harness.prose import batches
from ..harness.table import Table
from . import step_options, step_random
from .train import BATCH, LENGTH, MB

QUESTION = "Where does the time of our training step go?"

# An operator belongs to the first group with a word that its name contains.
GROUPS = {
    "lora_linear, backward": ("lora_linear_backward", "lora_linear_group_backward"),
    "lora_linear, forward": ("lora_linear",),
    "attention (torch)": ("attention",),
    "output head, its gradient (torch)": ("aten::mm", "aten::addmm", "aten::linear"),
    "softmax of the loss (torch)": ("softmax", "amax"),
    "optimizer (torch)": ("Optimizer", "foreach", "lerp", "addcdiv", "addcmul", "sqrt"),
    "copies and casts (torch)": ("copy", "aten::to", "contiguous", "clone", "fill", "zero"),
    "element by element (torch)": ("mul", "add", "silu", "neg", "pow", "rsqrt", "mean", "cat", "sum", "div", "sub"),
}
REST = "everything else, Python included"


def run(settings: Settings) -> list[Table]:
    """The table by operator needs a real model; that of random models, a GPU or tiny sizes."""
    if settings.device != "cuda" and not settings.quick:
        return [by_operator(settings)]
    tables = [step_random.table(settings)]
    if settings.device == "cuda" and settings.seconds is None:
        tables += step_options.tables(settings)
    if settings.seconds is None:
        with contextlib.suppress(Absent):
            tables.append(by_operator(settings))
    return tables


def by_operator(settings: Settings) -> Table:
    batch, length = (2, 32) if settings.quick else (BATCH, LENGTH)
    options = {"folder": settings.folder().resolve(), "device": settings.device, "batch": batch, "length": length}
    with Process("step", **options) as process:
        result = next(process)
    total = result["seconds"]
    rows = [
        {"what": group, "ms": 1e3 * seconds, "share, %": 100 * seconds / total} for group, seconds in result["groups"]
    ]
    return Table(
        f"A step of {settings.model.name}, {batch} x {length} tokens, r = 16 on every linear layer, by operator",
        rows,
        [
            f"one step of {1e3 * total:.0f} ms under torch.profiler, which slows it a little, after two to warm up",
            "each operator's own time",
            f"resident memory: {result['before'] / MB:.0f} MB when the model is loaded, Python and its libraries "
            f"included, {result['peak'] / MB:.0f} MB at the peak of the step",
        ],
    )


def group_of(name: str) -> str:
    """The group of an operator, by its name.

    >>> group_of("nf4lora::lora_linear_group_backward"), group_of("aten::mm"), group_of("aten::embedding")
    ('lora_linear, backward', 'output head, its gradient (torch)', 'everything else, Python included')
    >>> group_of("nf4lora::lora_linear_group"), group_of("nf4lora::lora_linear_backward")
    ('lora_linear, forward', 'lora_linear, backward')
    """
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), REST)


def contender(folder: str, device: str, batch: int, length: int):
    from torch.profiler import ProfilerActivity, profile

    model = adapted(OURS, folder, device=device)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    forget_peak(device)
    before = peak_bytes(device)
    steps = cycle(batches(folder, batch, length))

    def step() -> None:
        ids = next(steps).to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    peak = peak_bytes(device)
    with profile(activities=[ProfilerActivity.CPU]) as profiled, torch.profiler.record_function("a step"):
        step()
    events = profiled.key_averages()
    total = next(event for event in events if event.key == "a step").cpu_time_total / 1e6
    groups = dict.fromkeys([*GROUPS, REST], 0.0)
    for event in events:
        groups[group_of(event.key)] += event.self_cpu_time_total / 1e6
    # "a step" includes waiting for the backward pass, which runs in another thread, so its own time is a difference.
    groups[REST] = max(0.0, total - sum(seconds for group, seconds in groups.items() if group != REST))
    yield {"seconds": total, "groups": list(groups.items()), "before": before, "peak": peak}
