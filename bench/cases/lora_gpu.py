"""The tables of the case lora on a GPU: three times of a layer beside all rivals, and of the groups of layers that a
model calls with the same input. lora_block.py adds them up."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from nf4lora import ops

from ..harness import expected, groups, layers, steady, targets
from ..harness.case import Settings, check_close
from ..harness.composition import forget_buffers
from ..harness.contenders import ALPHA, RANK
from ..harness.groups import ONE_BY_ONE, SameInput
from ..harness.layers import BITSANDBYTES, CALLS, MAKERS, OURS, TORCH, TORCH_LORA, TORCHAO, adapter, forward
from ..harness.shapes import QUICK, Group, Shape, block_of, groups_of, named
from ..harness.table import Table
from ..harness.timing import ALONE, CLOCKS, HOW, Clock, Timing, alternate, heading, rotation
from .lora_block import BLOCKS, layer_table
from .lora_row import KINDS, Row, Took, described, ratio_of

# The first ones decide; a budget may leave out the last ones.
SHAPES = [
    *block_of("Llama-3.1-8B"),
    *block_of("Llama-3.2-1B"),
    *named("Llama-3.1-70B gate, up"),
    *block_of("Qwen2.5-7B"),
    *named("Llama-2-7B gate, up", "TinyLlama-1.1B down", "SmolLM2-135M down"),
]
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHECKED = 1024  # tokens up to which our answers are checked: enough for every kernel to be taken once
RIVALS_CHECKED = 16
# bf16 has a last place of 2**-8. torchao rounds the scales in its own way, so that its W is not ours to the bit.
TOLERANCES = {OURS: 2**-7, TORCHAO: 0.1}
TOLERANCE = 0.02
IN_16_BITS = (TORCH, TORCH_LORA)
PACKED = 0.52  # bytes of a weight: codes, scales, their scales

Turns = dict[str, Callable[[], nn.Module]]


class Budget:
    """Seconds that a case may take, and what did not fit in."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds
        self.left: list[str] = []

    def spent_before(self, what: str) -> bool:
        """Whether there is no time for this any more, which is then noted."""
        if self.end is None or time.monotonic() < self.end:
            return False
        self.left.append(what)
        return True

    def notes(self) -> list[str]:
        return [f"not measured, the time was spent: {'; '.join(self.left)}"] if self.left else []


def tables(settings: Settings) -> list[Table]:
    """Both directions, the groups, then the sums of blocks."""
    shapes, tokens, blocks = (QUICK, (1, 16), {QUICK[0].model}) if settings.quick else (SHAPES, TOKENS, BLOCKS)
    budget, names = Budget(settings.seconds), layers.present()
    rows: list[Row] = []
    group_rows: list[Row] = []
    missing: list[str] = []
    for measured in in_order(shapes, blocks):
        if budget.spent_before(measured.name):
            continue
        if isinstance(measured, Group):
            group_rows += rows_of_group(measured, tokens, settings, budget)
        else:
            rows += rows_of(measured, tokens, names, settings, budget, missing)
    notes = [
        f"LoRA of rank {RANK} on bf16 input; ours is a layer made by PEFT",
        HOW,
        *layers.notes(names),
        *missing,
        steady.NOTE,
        *budget.notes(),
    ]
    return [
        *(
            Table(
                text.capitalize() + ("" if kind == "both" else ", no gradients"),
                [described(row, names, settings.clocks) for row in rows if row.kind == kind],
                notes,
                latency_targets([row for row in rows if row.kind == kind], settings),
            )
            for kind, text in KINDS.items()
        ),
        group_table(group_rows, rows, names, settings),
        layer_table([*rows, *group_rows], names, settings),
    ]


def in_order(shapes: Iterable[Shape], blocks: Collection[str]) -> Iterator[Shape | Group]:
    """All shapes, and after the last one of a model among `blocks` its groups."""
    for model, of_model in groupby(shapes, key=lambda shape: shape.model):
        block = list(of_model)
        yield from block
        if model in blocks:
            yield from groups_of(block)


def rows_of(
    shape: Shape, tokens: Sequence[int], names: Sequence[str], settings: Settings, budget: Budget, missing: list[str]
) -> list[Row]:
    """A row of either kind for each number of tokens; `missing` gets a line for each rival that failed."""
    device = settings.device
    weight = drawn(shape, device)
    W = dequantised(weight)
    turns = turns_of(weight, names, device, partial(_failed, missing, shape.name))
    rows = []
    able: Turns = {}
    calls: dict[str, Callable[[], object]] = {}
    for M in tokens:
        if budget.spent_before(f"{shape.name}, {M} tokens"):
            continue
        x, dy = (torch.randn(M, size, device=device).bfloat16() for size in (shape.K, shape.N))
        for kind in KINDS:
            failed = partial(_failed, missing, f"{shape.name}, {M} tokens, {KINDS[kind]}")
            able = checked(turns, kind, x, dy, weight, W, failed)
            calls = {name: partial(CALLS[kind], turn, x, dy) for name, turn in able.items()}
            rows.append(Row(shape, M, kind, *timed(calls, settings)))
            print(progress(rows[-1]), flush=True)
    del turns, able, calls
    free(device)
    return rows


def rows_of_group(group: Group, tokens: Sequence[int], settings: Settings, budget: Budget) -> list[Row]:
    """A row of either kind for each number of tokens: our layers together, and one by one."""
    device = settings.device
    weights = [drawn(part, device) for part in group.parts]
    Ws = [dequantised(weight) for weight in weights]
    turn = partial(next, rotation(lambda _: SameInput(weights), int(PACKED * group.weights), device))
    rows = []
    calls: dict[str, Callable[[], object]] = {}
    for M in tokens:
        if budget.spent_before(f"{group.name}, {M} tokens"):
            continue
        x, *dys = (torch.randn(M, size, device=device).bfloat16() for size in (group.K, *(p.N for p in group.parts)))
        for kind in KINDS:
            calls = groups.calls(kind, turn, x, dys)
            if M <= CHECKED:
                for name, call in calls.items():
                    groups.check(f"{group.name}, {name}", kind, call(), x, dys, Ws, TOLERANCES[OURS])
            rows.append(Row(group, M, kind, *timed(calls, settings)))
            print(progress(rows[-1]), flush=True)
    del turn, calls
    free(device)
    return rows


def drawn(shape: Shape, device: str) -> Tensor:
    return torch.randn(shape.N, shape.K, device=device).mul_(0.02).bfloat16()


def free(device: str) -> None:
    """Give back the memory of what was measured."""
    forget_buffers()
    if device == "cuda":
        torch.cuda.empty_cache()


def timed(calls: Mapping[str, Callable[[], object]], settings: Settings) -> tuple[Took, float]:
    """The times by each clock, and by how much the host moved at most."""
    took, moved = {}, []
    seconds, most = (0.02, 5) if settings.quick else (0.15, 30)
    for name in settings.clocks:

        def measure(look: Callable[[], None], clock: Clock = CLOCKS[settings.device][name]) -> dict[str, Timing]:
            return alternate(calls, seconds=seconds, most=most, device=settings.device, clock=clock, between=look)

        took[name], movement = steady.steadily(measure, settings.device)
        moved.append(movement)
    return took, max(moved)


def turns_of(weight: Tensor, names: Sequence[str], device: str, failed: Callable[[str, Exception], None]) -> Turns:
    """For each contender a function that returns its next copy; contenders that cannot be made are left out."""
    packed = weight.numel() * PACKED
    turns: Turns = {}
    one = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=device)
    for name in names:

        def ready(_: int, name: str = name) -> nn.Module:
            layer = MAKERS[name](weight).train()
            forward(lambda: layer, one)
            return layer

        try:
            copies = rotation(ready, weight.nbytes if name in IN_16_BITS else int(packed), device)
        except Exception as error:
            failed(name, error)
        else:
            turns[name] = partial(next, copies)
    return turns


def checked(
    turns: Turns,
    kind: str,
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    W: Tensor,
    failed: Callable[[str, Exception], None],
) -> Turns:
    """The contenders that can take this call. Our answer is checked, and the rivals', so that they do the same work.

    Raises:
        WrongAnswer: ours is wrong.
    """
    able = {}
    M = len(x)
    lora = adapter(len(weight), weight.shape[1], weight.device)
    for name, turn in turns.items():
        try:
            if M <= (CHECKED if name == OURS else RIVALS_CHECKED):
                own, AB = weight if name in IN_16_BITS else W, (None, None) if name == TORCH else lora
                wanted = answers(kind, x, dy, own, *AB)
                result = CALLS[kind](turn, x, dy)
                for number, (tensor, right) in enumerate(zip(_tuple(result), wanted, strict=True)):
                    check_close(f"{name}, {M} tokens, {kind} {number}", tensor, right, TOLERANCES.get(name, TOLERANCE))
            else:
                CALLS[kind](turn, x, dy)  # whether there is memory for it
        except Exception as error:
            failed(name, error)
        else:
            able[name] = turn
    return able


def answers(kind: str, x: Tensor, dy: Tensor, W: Tensor, A: Tensor | None, B: Tensor | None) -> tuple[Tensor, ...]:
    if kind == "forward":
        return (expected.forward(x, W, A, B, ALPHA / RANK)[0],)
    return expected.backward(dy, x, W, A, B, ALPHA / RANK)


def dequantised(weight: Tensor) -> Tensor:
    """The weight as NF4 with double quantisation has it."""
    codes, scales = ops.nf4_quantize(weight)
    return ops.nf4_dequantize(codes, ops.absmax_dequantize(*ops.absmax_quantize(scales)), dtype=weight.dtype)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _failed(missing: list[str], where: str, name: str, error: Exception) -> None:
    """Note that a rival cannot be measured; a card is lent for minutes, and the others go on. Ours must not fail."""
    if name == OURS:
        raise error
    first_line = (str(error).splitlines() or [""])[0]
    missing.append(f"{where}: {name} is not measured: {type(error).__name__}: {first_line.strip()}")


def progress(row: Row) -> str:
    """One line about a row, so that an interrupted run has said what it measured."""
    parts = []
    for clock in row.took:
        ours, *others = row.medians(clock).items()
        ratios = [f"{ours[1] / seconds:.2f} of {name}" for name, seconds in others]
        parts.append(", ".join([f"{heading(clock)} {1e3 * ours[1]:.4f} ms", *ratios]))
    return f"{row.shape.name}, {row.M} tokens, {KINDS[row.kind]}: {'; '.join(parts)}"


# ---- tables ----


def group_table(group_rows: Iterable[Row], rows: Iterable[Row], names: Sequence[str], settings: Settings) -> Table:
    """The groups, beside their layers one by one, and beside each rival's layers, of which `rows` tell the times."""
    single = {(row.shape, row.M, row.kind): row for row in rows}
    cells = []
    for row in group_rows:
        assert isinstance(row.shape, Group)
        cell: dict = {"layers": row.shape.name, "pass": KINDS[row.kind], "M": row.M}
        parts = [single.get((part, row.M, row.kind)) for part in row.shape.parts]
        for clock in settings.clocks:
            took = row.took[clock]
            cell[f"{heading(clock)}, ms"] = took[OURS].spread()
            cell[f"{heading(clock)}: together / one by one"] = took[OURS].over(took[ONE_BY_ONE])
        for rival in names[1:]:
            for clock in settings.clocks:
                of_parts = [part.medians(clock).get(rival) if part else None for part in parts]
                theirs = None if None in of_parts else sum(of_parts)
                cell[ratio_of(clock, rival)] = row.medians(clock)[OURS] / theirs if theirs else None
        cells.append({**cell, "host moved": steady.shown(row.moved)})
    return Table(
        "Groups: layers that a model calls with the same input, which are computed together",
        cells,
        [
            "PEFT's layers of a group called in turn with one x, recording a graph, without which there are no groups; "
            "one by one: the same layers where none is computed for another; dx is the sum of all",
            "ours / a rival: to the sum of the medians of its single layers, which it computes one by one; "
            "without the additions of their dx",
            HOW,
        ],
    )


# ---- targets ----


def latency_targets(rows: Sequence[Row], settings: Settings) -> list[tuple[str, bool]]:
    """The targets of one call alone, forward and backward, each for the layer that is worst."""
    allowance = targets.allowance(settings.device)
    rows = [row for row in rows if row.kind == "both" and ALONE in row.took]
    if allowance is None or settings.quick:
        return []
    few, many = [row for row in rows if row.M <= targets.FEW], [row for row in rows if row.M >= targets.MANY]
    claims = []
    for chosen, span, limit in (
        (few, f"1 to {targets.FEW} tokens", targets.FEW_OF_BITSANDBYTES),
        (many, f"from {targets.MANY} tokens", targets.MANY_OF_BITSANDBYTES),
    ):
        ratios = [
            (took[OURS] / took[BITSANDBYTES], row) for row in chosen if BITSANDBYTES in (took := row.medians(ALONE))
        ]
        if ratios:
            worst, row = max(ratios, key=lambda pair: pair[0])
            claim = f"one call, {span}, worst {row.shape.name} at {row.M}: {{}} of bitsandbytes + PEFT's time"
            claims.append(targets.at_most(claim, limit + allowance, worst))
    above = [(took[OURS] - took[TORCH], row) for row in few if TORCH in (took := row.medians(ALONE))]
    if above:
        worst, row = max(above, key=lambda pair: pair[0])
        span = f"1 to {targets.FEW} tokens, worst {row.shape.name} at {row.M}"
        claim = f"one call, {span}: {{}} us more than F.linear without LoRA"
        claims.append(targets.at_most(claim, 1e6 * targets.FEW_ABOVE_TORCH, 1e6 * worst, digits=0))
    return claims
