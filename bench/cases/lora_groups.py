"""A table of the case lora on a CPU: layers of the same input computed together, beside the same layers one by one."""

from __future__ import annotations

from functools import partial

import torch

from ..harness import groups
from ..harness.case import Settings, check_equal
from ..harness.contenders import RANK
from ..harness.groups import ONE_BY_ONE, SameInput
from ..harness.layers import OURS
from ..harness.shapes import QUICK, Group, block_of, groups_of
from ..harness.table import Table
from ..harness.timing import alternate, rotation
from .lora_gpu import KINDS, PACKED, dequantised

TOKENS = (1, 16, 256)
# Of products in float32 of the largest value: bf16 has a last place of 2**-8, float32 sums thousands of terms.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def table(settings: Settings) -> Table:
    tokens = TOKENS[:2] if settings.quick else TOKENS
    rows = []
    for group in groups_of(QUICK) if settings.quick else measured():
        for dtype in TOLERANCES:
            rows += rows_of(group, dtype, tokens, settings)
    return Table(
        "Groups: layers that a model calls with the same input, which are computed together",
        rows,
        [
            f"LoRA of rank {RANK}; PEFT's layers of a group called in turn with one x, whose outputs the first call "
            "computes; one by one: the same layers where none is computed for another; a graph is recorded",
            "both have the same bits; with a backward pass, dx is the sum of all; nf4lora groups layers on a GPU only",
        ],
    )


def measured() -> list[Group]:
    """A group whose calls take less time than the host's part in them, and the two of a larger model."""
    return [*groups_of(block_of("SmolLM2-135M"))[:1], *groups_of(block_of("Llama-3.2-1B"))]


def rows_of(group: Group, dtype: torch.dtype, tokens: tuple[int, ...], settings: Settings) -> list[dict]:
    """A row for each number of tokens."""
    weights = [torch.randn(part.N, part.K).mul_(0.02).to(dtype) for part in group.parts]
    Ws = [dequantised(weight) for weight in weights]
    turn = partial(next, rotation(lambda _: SameInput(weights), int(PACKED * group.weights)))
    first = turn()
    rows = []
    for M in tokens:
        x, *dys = (torch.randn(M, size).to(dtype) for size in (group.K, *(part.N for part in group.parts)))
        row: dict = {"layers": group.name, "dtype": str(dtype).removeprefix("torch."), "M": M}
        for kind, text in KINDS.items():
            answers = groups.calls(kind, lambda: first, x, dys)
            together, one_by_one = answers[OURS](), answers[ONE_BY_ONE]()
            groups.check(f"{group.name}, {dtype}", kind, one_by_one, x, dys, Ws, TOLERANCES[dtype])
            for number, (result, right) in enumerate(zip(together, one_by_one, strict=True)):
                check_equal(f"{group.name} together, {dtype}, {M} tokens, {text} {number}", result, right)
            calls = groups.calls(kind, turn, x, dys)
            took = alternate(calls, seconds=0.1 if settings.quick else 2.0)
            row[f"{text}, ms"] = took[OURS].spread()
            row[f"{text}: together / one by one"] = took[OURS].over(took[ONE_BY_ONE])
        rows.append(row)
    return rows
