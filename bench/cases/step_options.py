"""Tables of the case step: what the options for speed of `nf4lora train` change in it, and what takes its time then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch

from nf4lora.train.speed import attention, compiled, graphs, liger
from nf4lora.train.speed.blocks import decoder_blocks

from ..harness import random_model
from ..harness.case import Settings, WrongAnswer
from ..harness.contenders import OURS
from ..harness.process import Process
from ..harness.table import Table
from ..harness.timing import Timing
from .lora_gpu import Budget
from .step_random import chosen, measured

NONE = "none"
OPTIONS = (  # those that are joined by + are on together
    NONE, "flash_attention_2", "flash_attention_3", "use_liger_kernel", "torch_compile", "cuda_graphs",
    "use_liger_kernel + cuda_graphs", "use_liger_kernel + flash_attention_2", "use_liger_kernel + flash_attention_3",
)  # fmt: skip
LARGE = 0.05  # share of a step from which a part is named
SAME = 0.02  # what losses of 16-bit models may differ by, as a share

Answer = dict[str, Any]


def tables(settings: Settings) -> list[Table]:
    """Steps of random models with each option in a process of its own; and their parts, as far as a trace has them."""
    models, tokens, layers = chosen(settings)
    options = [option for option in OPTIONS if not (settings.quick and "torch_compile" in option)]
    budget = Budget(settings.seconds)
    rows: list[dict] = []
    parts: list[dict] = []
    for model in models:
        for M in tokens:
            alone: Answer | None = None
            for option in options:
                what = f"{model}, {M} tokens, {option}"
                if budget.spent_before(what):
                    continue
                answer = missing(option, settings.device) or asked(model, M, option, layers, settings)
                if isinstance(answer, dict) and option == NONE:
                    alone = answer
                rows.append(row(model, M, option, answer, alone))
                if isinstance(answer, dict):
                    parts += rows_of_parts(model, M, option, answer)
    about = f"the first {layers} blocks of " if layers else ""
    names = f"{about}{' and '.join(models)}"
    return [
        Table(
            f"A step of {names} with the options of nf4lora train for speed",
            rows,
            [
                "as in the table above, without checkpointing; each option in a process of its own",
                "of none: over the time, or the memory, of a step without any of them",
                *budget.notes(),
            ],
        ),
        Table(
            f"What a step of {names} consists of, by the option",
            parts,
            [
                "kernels and copies of one step under torch.profiler, by their names; several may run at once",
                *named(parts),
            ],
        ),
    ]


def missing(option: str, device: str) -> str:
    """Why an option cannot be measured here; nothing where it can."""
    find: dict[str, Callable[[], str]] = {
        "flash_attention_2": lambda: attention.missing("flash_attention_2", device, torch.bfloat16),
        "flash_attention_3": lambda: attention.missing("flash_attention_3", device, torch.bfloat16),
        "use_liger_kernel": lambda: liger.missing(device) or liger.unknown("llama"),
        "torch_compile": lambda: compiled.missing(device),
        "cuda_graphs": lambda: graphs.missing(device),
    }
    reasons = (find[name]() for name in option.split(" + ") if name != NONE)
    return next(filter(None, reasons), "")


def asked(model: str, M: int, option: str, layers: int | None, settings: Settings) -> Answer | str:
    """What a process of its own measures; a text where it ends."""
    arguments = {"shape": model, "layers": layers, "device": settings.device, "option": option}
    try:
        with Process("step_options", **arguments) as process:
            next(process)
            return process.ask(tokens=M, steps=2 if settings.quick else 5)
    except RuntimeError as error:
        if option == NONE:
            raise
        return f"ended: {str(error).strip().splitlines()[-1]}"


def row(model: str, M: int, option: str, answer: Answer | str, alone: Answer | None) -> dict:
    """A row of the first table.

    Raises:
        WrongAnswer: the loss of the first step is another one with the option.
    """
    cells = {"model": model, "tokens": M, "option": option}
    keys = ("a step, s", "time, of none", "peak, MB", "peak, of none", "card busy, %")
    if isinstance(answer, str) or "seconds" not in answer:
        return cells | dict.fromkeys(keys) | {"why not": answer if isinstance(answer, str) else "no memory for it"}
    took, base = Timing(answer["seconds"]), Timing(alone["seconds"]) if alone and "seconds" in alone else None
    if alone and "loss" in alone and not abs(answer["loss"] / alone["loss"] - 1) < SAME:
        raise WrongAnswer(f"{option}: the loss of the first step is {answer['loss']}, without it {alone['loss']}")
    values = (
        took.spread(1),
        took.over(base) if base else None,
        answer["peak"] / 1e6,
        answer["peak"] / alone["peak"] if alone and "peak" in alone else None,
        100 * answer["busy"] / took.median if answer["busy"] is not None else None,
    )
    return cells | dict(zip(keys, values, strict=True)) | {"why not": ""}


def rows_of_parts(model: str, M: int, option: str, answer: Answer) -> list[dict]:
    """Rows of the second table, the longest part first."""
    parts = sorted(answer.get("parts", {}).items(), key=lambda part: -part[1])
    total = sum(seconds for _, seconds in parts)
    return [
        {"model": model, "tokens": M, "option": option, "part": part, "ms": 1e3 * s, "share, %": 100 * s / total}
        for part, s in parts
    ]


def named(parts: list[dict]) -> list[str]:
    """Which parts are large, by the option.

    >>> rows = [("none", "attention", 40.0), ("none", "copies and fills", 4.0), ("cuda_graphs", "attention", 6.0)]
    >>> named([{"option": option, "part": part, "share, %": share} for option, part, share in rows])
    ['over 5 % of the time on the card: none: attention; cuda_graphs: attention']
    >>> named([])
    ['no trace of a card could be had']
    """
    large: dict[str, list[str]] = {}
    for cells in parts:
        if cells["share, %"] > 100 * LARGE and cells["part"] not in large.setdefault(cells["option"], []):
            large[cells["option"]].append(cells["part"])
    lines = "; ".join(f"{option}: {', '.join(names)}" for option, names in large.items())
    return [
        f"over {100 * LARGE:.0f} % of the time on the card: {lines}" if lines else "no trace of a card could be had"
    ]


# ---- in a process of its own ----


def contender(shape: str, layers: int | None, device: str, option: str) -> Generator[Answer, dict[str, Any], None]:
    """Builds the model with the option, then measures what it is asked for."""
    model = random_model.adapted(OURS, shape, device, layers)
    around: Callable[[], Any] = contextlib.nullcontext
    with contextlib.ExitStack() as stack:
        for name in option.split(" + "):
            if name in attention.FLASH:
                model.get_base_model().set_attn_implementation(name)
            elif name == "use_liger_kernel":
                stack.enter_context(liger.liger_kernels(model, list(range(64))))
            elif name == "torch_compile":
                compiled.compile_blocks(model)
            elif name == "cuda_graphs":
                block_graphs = graphs.BlockGraphs(decoder_blocks(model, name))
                stack.callback(block_graphs.remove)
                around = block_graphs.batch
        question = yield {}
        while True:
            try:
                answer = measured(model, device, checkpointing=False, around=around, **question)
            except torch.OutOfMemoryError:
                answer = {"out_of_memory": True}
            question = yield answer
