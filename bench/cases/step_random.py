"""Tables of the case step: a training step of models of real shapes with random weights, beside bitsandbytes + PEFT."""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..harness import random_model, steady, targets
from ..harness.case import Settings, WrongAnswer, installed, without
from ..harness.contenders import OURS, RANK, RIVAL
from ..harness.process import Process, forget_peak, peak_bytes
from ..harness.table import Table
from ..harness.timing import Timing
from .lora_gpu import Budget

MODELS = ("Llama-3.1-8B", "Llama-3.2-1B")
TOKENS = (2048, 4096, 8192)
STEPS, WARM = 5, 2
MB = 1e6
BUSY = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace in which the card works

Answer = dict[str, Any]  # what a contender measured: see `measured`


def table(settings: Settings) -> Table:
    """All models, with checkpointing and without, ours and the rival in a process each."""
    models, tokens, layers = chosen(settings)
    names = [OURS, *([RIVAL] if installed("bitsandbytes") else [])]
    budget, rows = Budget(settings.seconds), []
    missing: list[str] = []
    for model in models:
        if budget.spent_before(model):
            continue
        with contextlib.ExitStack() as stack:
            arguments = {"shape": model, "layers": layers, "device": settings.device}
            processes = {name: stack.enter_context(Process("step_random", name=name, **arguments)) for name in names}
            for process in processes.values():  # both build at once
                process.start()
            for name in names:
                answered(processes, name, missing)
            for M in tokens:
                for checkpointing in (False, True):
                    what = f"{model}, {M} tokens, {'with' if checkpointing else 'without'} checkpointing"
                    if not budget.spent_before(what):
                        rows.append(row(model, M, checkpointing, processes, missing, settings))
                        print(progress(what, rows[-1]), flush=True)
    blocks = f"the first {layers} blocks of " if layers else ""
    return Table(
        f"A step of {blocks}{' and '.join(models)} with random weights, r = {RANK} on every linear layer",
        rows,
        [
            "a step: forward with labels, backward, torch.optim.AdamW, in a plain loop without autocast, one text of "
            "so many tokens; bf16, NF4 with double quantisation, adapters in float32; no file is read",
            f"each contender in a process of its own, of which one works at a time; medians of {STEPS} steps after "
            f"{WARM} to warm up; checkpointing: non-reentrant",
            "card busy: the time in which a kernel or a copy runs in one step under torch.profiler, over the time of a "
            "step without it; peak: the most memory that torch allocated (on a CPU: resident), the model included",
            "-: no memory for it",
            steady.NOTE,
            *without("bitsandbytes"),
            *missing,
            *budget.notes(),
        ],
        step_targets(rows, settings),
    )


def chosen(settings: Settings) -> tuple[tuple[str, ...], tuple[int, ...], int | None]:
    """Models, numbers of tokens, and how many blocks of each model; None for all."""
    if not settings.quick:
        return MODELS, TOKENS, None
    return (("Llama-3.2-1B",), (256,), 2) if settings.device == "cuda" else (("tiny",), (32,), 2)


def row(
    model: str, M: int, checkpointing: bool, processes: dict[str, Process], missing: list[str], settings: Settings
) -> dict:
    """One row, measured again while the host moves."""
    question = {"tokens": M, "checkpointing": checkpointing, "steps": 2 if settings.quick else STEPS}
    kept: tuple[float, dict[str, Answer]] | None = None
    for _ in range(steady.TRIES if settings.device == "cuda" else 1):
        answers = {}
        for name in list(processes):
            processes[name].start(question)
            if (answer := answered(processes, name, missing)) is not None:
                answers[name] = answer
        check_losses(answers)
        moved = steady.movement([s for answer in answers.values() for s in answer.get("host", [])] or [1.0])
        if kept is None or moved < kept[0]:
            kept = moved, answers
        if kept[0] <= steady.MOST:
            break
    assert kept is not None  # there is one try at least
    return described(model, M, checkpointing, kept[1]) | {"host moved": steady.shown(kept[0])}


def answered(processes: dict[str, Process], name: str, missing: list[str]) -> Answer | None:
    """What a contender yields. A rival whose process ends is left out from then on; ours must not end."""
    try:
        return processes[name].result()
    except RuntimeError as error:
        if name == OURS:
            raise
        missing.append(f"{name} ended: {str(error).strip().splitlines()[-1]}")
        del processes[name]
        return None


def check_losses(answers: dict[str, Answer]) -> None:
    """The losses of the first step, on the same weights and tokens, must be alike."""
    losses = [answer["loss"] for answer in answers.values() if "loss" in answer]
    if losses and not max(losses) / min(losses) - 1 < 0.2:
        raise WrongAnswer(f"losses of the first step: {losses}")


def described(model: str, M: int, checkpointing: bool, answers: dict[str, Answer]) -> dict:
    """A row of the table."""
    ours, rival = (_Step(answers.get(name, {}), M) for name in (OURS, RIVAL))
    return {
        "model": model,
        "tokens": M,
        "checkpointing": checkpointing,
        "ours, s": ours.took and ours.took.spread(1),
        f"{RIVAL}, s": rival.took and rival.took.spread(1),
        "time, ours / rival": ours.took.over(rival.took) if ours.took and rival.took else None,
        "ours, tokens/s": ours.rate,
        f"{RIVAL}, tokens/s": rival.rate,
        "our peak, MB": ours.peak and ours.peak / MB,
        f"{RIVAL}'s peak, MB": rival.peak and rival.peak / MB,
        "peak, ours / rival": ours.peak / rival.peak if ours.peak and rival.peak else None,
        "card busy, ours, %": ours.busy,
        f"card busy, {RIVAL}, %": rival.busy,
    }


class _Step:
    """An answer's figures; each is None where it has none."""

    def __init__(self, answer: Answer, M: int) -> None:
        seconds = answer.get("seconds")
        self.took = Timing(seconds) if seconds else None
        self.rate = M / self.took.median if self.took else None
        self.peak = answer.get("peak")
        busy = answer.get("busy")
        self.busy = 100 * busy / self.took.median if busy is not None and self.took else None


def progress(what: str, cells: dict) -> str:
    """One line about a row, so that an interrupted run has said what it measured."""
    parts = []
    for key in ("ours, s", "time, ours / rival", "peak, ours / rival", "card busy, ours, %"):
        value = cells[key]["median"] if isinstance(cells[key], dict) else cells[key]
        parts.append(f"{key} {'-' if value is None else f'{value:.3f}'}")
    return f"{what}: {'; '.join(parts)}"


def step_targets(rows: Iterable[dict], settings: Settings) -> list[tuple[str, bool]]:
    allowance = targets.allowance(settings.device)
    if allowance is None or settings.quick:
        return []
    claims = []
    for cells in rows:
        if cells["tokens"] not in targets.STEP_TOKENS:
            continue
        what = f"{cells['model']}, {cells['tokens']} tokens, {'with' if cells['checkpointing'] else 'no'} checkpointing"
        if cells["time, ours / rival"] is not None:
            limit, got = targets.STEP_OF_BITSANDBYTES + allowance, cells["time, ours / rival"]["median"]
            claims.append(targets.at_most(f"{what}: {{}} of {RIVAL}'s time", limit, got))
        if cells["peak, ours / rival"] is not None:
            limit, got = targets.MEMORY_OF_BITSANDBYTES, cells["peak, ours / rival"]
            claims.append(targets.at_most(f"{what}: {{}} of {RIVAL}'s memory", limit, got))
        if (busy := cells["card busy, ours, %"]) is not None:
            least = 100 * targets.BUSY
            claims.append((f"{what}: the card busy {least:.0f} % of a step at least, got {busy:.0f} %", busy >= least))
    return claims


# ---- in a process of its own ----


def contender(name: str, shape: str, layers: int | None, device: str) -> Generator[Answer, dict[str, Any], None]:
    """Builds the model, then measures what it is asked for."""
    start = time.perf_counter()
    model = random_model.adapted(name, shape, device, layers)
    answer: Answer = {"built": time.perf_counter() - start}
    while True:
        question = yield answer
        try:
            answer = measured(model, device, **question)
        except torch.OutOfMemoryError:
            answer = {"out_of_memory": True}
        model.zero_grad(set_to_none=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()  # the other contender's turn, which needs the card's memory


def measured(
    model: Any,
    device: str,
    tokens: int,
    checkpointing: bool,
    steps: int,
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Answer:
    """What steps of so many tokens take, after some to warm up.

    Args:
        around: a context for each forward pass

    Returns:
        seconds: of each step;  peak: bytes of memory;  loss: of the first step
        busy: seconds of a step in which the card works, None on a CPU
        parts: seconds of it by what the card does
        host: the host's seconds of F.linear before each step and at the end
    """
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(device)
    forget_peak(device)

    def step() -> float:
        start = time.perf_counter()
        with around():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    losses: list[torch.Tensor] = []
    host = steady.Host(device)
    for _ in range(WARM):
        step()
    seconds = []
    for _ in range(steps):
        host.look()
        seconds.append(step())
    host.look()
    peak = peak_bytes(device)
    events = trace_of(step, device)
    return {
        "seconds": seconds,
        "peak": peak,
        "loss": losses[0].item(),
        "busy": busy_seconds(events),
        "parts": seconds_by_part(events),
        "host": host.seconds,
    }


def trace_of(step: Any, device: str) -> list[dict]:
    """The events of a trace of the card during one more step; none where it cannot be had."""
    from torch import profiler

    on_card = profiler.ProfilerActivity.CUDA
    if device != "cuda" or on_card not in profiler.supported_activities():
        return []
    with profiler.profile(activities=[on_card]) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def busy_seconds(events: Iterable[dict]) -> float | None:
    """The time in which at least one kernel or copy of a trace runs; None if it has none.

    >>> kernels = [{"cat": "kernel", "ts": start, "dur": 10} for start in (0, 5, 100)]
    >>> busy_seconds([*kernels, {"cat": "gpu_user_annotation", "ts": 0, "dur": 1000}])
    2.5e-05
    >>> busy_seconds([{"cat": "cpu_op", "ts": 0, "dur": 10}, {"name": "a mark"}])
    """
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in BUSY)
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6 if spans else None


# A kernel of a trace belongs to the first part with a word that its name contains, in small letters.
PARTS = {
    "nf4lora's kernels": ("nf4lora",),
    "attention": ("flash", "fmha", "attention"),
    "products of matrices (cuBLAS)": ("gemm", "gemv", "cutlass", "cublas", "nvjet", "xmma"),
    "Liger's kernels": ("rms_norm", "_rope", "swiglu", "geglu", "liger"),
    "compiled by torch": ("triton_",),
    "optimizer": ("multi_tensor", "adam"),
    "softmax and sums": ("softmax", "reduce"),
    "element by element": ("elementwise", "catarray", "index", "gather", "scatter", "embedding"),
}
COPIES, REST = "copies and fills", "other kernels"


def seconds_by_part(events: Iterable[dict]) -> dict[str, float]:
    """The time of a trace's kernels and copies by what they do.

    >>> names = ["void nf4lora::cuda::lora_gemm_kernel<8>()", "flash_fwd_kernel", "nvjet_tst", "triton_poi_fused"]
    >>> seconds_by_part({"cat": "kernel", "name": name, "ts": 0, "dur": 3e6} for name in names)
    {"nf4lora's kernels": 3.0, 'attention': 3.0, 'products of matrices (cuBLAS)': 3.0, 'compiled by torch': 3.0}
    >>> seconds_by_part([{"cat": "gpu_memset", "dur": 1e6}, {"cat": "cpu_op", "dur": 9.0, "name": "aten::mm"}])
    {'copies and fills': 1.0}
    """
    seconds: dict[str, float] = {}
    for event in events:
        if event.get("cat") not in BUSY:
            continue
        name = event.get("name", "").lower()
        part = next((part for part, words in PARTS.items() if any(word in name for word in words)), REST)
        part = part if event["cat"] == "kernel" else COPIES
        seconds[part] = seconds.get(part, 0.0) + event["dur"] / 1e6
    return seconds
