"""tune: times every kernel of lora_linear on a GPU and derives the rules of heuristics.json.

The case runs only if it is named: it rewrites python/nf4lora/ops/kernels/heuristics.json for the card's architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from nf4lora import ops
from nf4lora.ops.arguments import LoraLinear, LoraLinearBackward
from nf4lora.ops.kernels import dispatch

from ..harness import expected, heuristics, steady
from ..harness.case import Absent, Settings, check_close
from ..harness.contenders import ALPHA, RANK
from ..harness.layers import taking
from ..harness.machine import TOP, commit
from ..harness.results import IN_REPOSITORY
from ..harness.shapes import Shape, named
from ..harness.table import Table
from ..harness.timing import ALONE, CLOCKS, HOW, IN_A_ROW, NAMES, SATURATED, Clock, Timing, alternate, heading, rotation

QUESTION = "Which kernel is the fastest for how many tokens, forward and backward, on this GPU?"

SHAPES = named(
    "SmolLM2-135M q, o",
    "SmolLM2-135M gate, up",
    "Llama-3.1-8B k, v",
    "TinyLlama-1.1B down",
    "Llama-3.1-8B q, o",
    "Llama-2-7B gate, up",
    "Llama-3.1-8B down",
)
QUICK = named("SmolLM2-135M q, o", "Llama-3.1-8B q, o")
TOKENS = tuple(2**power for power in range(15))
SMALL = 1 << 22  # weights of a small layer: the largest power of two that holds k and v of an 8B model
TOLERANCE = 0.02  # a few units of bf16's last place, 2**-8, to which S and T are rounded
PATH = TOP / "python/nf4lora/ops/kernels/heuristics.json"

Packed = tuple[Tensor, Tensor, Tensor]  # qweight, absmax and nested


@dataclass(frozen=True)
class Time:
    """Times of all kernels that support this number of tokens, for a layer N x K, by kernel.

    seconds: of a call among many in a row, which is the host's where it takes longer than the card
    saturated: of the card's work alone
    alone: the latency of one call
    moved: by how much the host became faster or slower meanwhile
    """

    direction: str
    N: int
    K: int
    tokens: int
    seconds: dict[str, float]
    saturated: dict[str, float] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0

    @property
    def in_a_step(self) -> dict[str, float]:
        """What a call adds to a step, by kernel: the longer one of host and card. The rules follow it.

        >>> Time("forward", 64, 64, 1, {"few": 3.0, "fused": 2.0}, {"few": 1.0, "fused": 2.5}).in_a_step
        {'few': 3.0, 'fused': 2.5}
        """
        return {name: max(seconds, self.saturated.get(name, 0.0)) for name, seconds in self.seconds.items()}


def run(settings: Settings) -> list[Table]:
    if settings.device != "cuda":
        raise Absent("tune chooses between the kernels of a GPU: it needs a CUDA device")
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}"
    shapes, tokens = (QUICK, (1, 16, 32)) if settings.quick else (SHAPES, TOKENS)
    times = [time for shape in shapes for time in times_of(shape, tokens, settings)]
    rules = rules_from(times, architecture, f"{torch.cuda.get_device_name()}, {commit() or 'no commit'}")
    if settings.quick or not IN_REPOSITORY:
        note = "not written: tiny sizes" if settings.quick else "not written: this is no repository of nf4lora"
        print(heuristics.text(rules), flush=True)
    else:
        heuristics.rewrite(PATH, architecture, rules)
        note = f"written into {PATH.relative_to(TOP)}"
    return [
        *(table_of(direction, times, rules) for direction in dispatch.CHOICES),
        Table(f"Rules of {architecture}", [asdict(rule) for rule in rules], [note]),
    ]


# ---- times ----


def times_of(shape: Shape, tokens: Sequence[int], settings: Settings) -> list[Time]:
    """Times of both directions of one layer, in bf16 with LoRA. Each answer is checked first, by torch's products."""
    device = settings.device
    weight = torch.randn(shape.N, shape.K, device=device).mul_(0.02).bfloat16()
    qweight, scales = ops.nf4_quantize(weight)
    packed: Packed = (qweight, *ops.absmax_quantize(scales))
    W = ops.nf4_dequantize(qweight, ops.absmax_dequantize(*packed[1:]), dtype=weight.dtype)
    nbytes = sum(tensor.nbytes for tensor in packed)
    turn: Iterator[Any] = rotation(lambda _: tuple(tensor.clone() for tensor in packed), nbytes, device)
    A, B = (torch.randn(size, device=device).mul_(0.02) for size in ((RANK, shape.K), (shape.N, RANK)))
    adapter: dict[str, Any] = {"lora_A": A, "lora_B": B, "scaling": ALPHA / RANK}

    def forward(x: Tensor, packed: Packed) -> tuple[Tensor, ...]:
        return torch.ops.nf4lora.lora_linear(*LoraLinear(x, *packed, **adapter))

    def backward(dy: Tensor, x: Tensor, S: Tensor, packed: Packed) -> tuple[Tensor, ...]:
        return torch.ops.nf4lora.lora_linear_backward(*LoraLinearBackward(dy, x, S, *packed, **adapter))

    times = []
    for M in tokens:
        x, dy = (torch.randn(M, size, device=device).bfloat16() for size in (shape.K, shape.N))
        products = expected.forward(x, W, A, B, ALPHA / RANK)
        S = products[1]
        for direction, call in (("forward", partial(forward, x)), ("backward", partial(backward, dy, x, S))):
            right = products if direction == "forward" else expected.backward(dy, x, W, A, B, ALPHA / RANK)
            able = [name for name in dispatch.KERNELS if dispatch.fits(name, direction, M, x.dtype, shape.N)]
            kernels = {name: taking(name, call) for name in able}
            answers = {name: kernel(packed) for name, kernel in kernels.items()}
            check_kernels(f"{shape.name}, {M} tokens, {direction}", answers, right)
            del right, answers
            turns = {name: partial(_on_next, kernel, turn) for name, kernel in kernels.items()}
            medians, moved = {}, []
            for name in NAMES:
                medians[name], movement = _medians(turns, CLOCKS[device][name], settings)
                moved.append(movement)
            in_a_row, saturated, alone = (medians[name] for name in (IN_A_ROW, SATURATED, ALONE))
            times.append(Time(direction, shape.N, shape.K, M, in_a_row, saturated, alone, max(moved)))
    return times


def _medians(turns: Mapping[str, Callable], clock: Clock, settings: Settings) -> tuple[dict[str, float], float]:
    """Seconds by kernel, and by how much the host moved meanwhile."""
    seconds, most = (0.05, 5) if settings.quick else (0.1, 30)

    def measure(look: Callable[[], None]) -> dict[str, Timing]:
        return alternate(turns, seconds=seconds, most=most, device=settings.device, clock=clock, between=look)

    took, moved = steady.steadily(measure, settings.device)
    return {name: timing.median for name, timing in took.items()}, moved


def _on_next(kernel: Callable[[Packed], object], turn: Iterator[Packed]) -> object:
    return kernel(next(turn))


def check_kernels(what: str, answers: dict[str, tuple[Tensor, ...]], right: tuple[Tensor, ...]) -> None:
    """Check the answers of all kernels against those of torch's products in float32."""
    for name, answer in answers.items():
        for number, (result, wanted) in enumerate(zip(answer, right, strict=True)):
            check_close(f"{name}, {what}, result {number}", result, wanted, TOLERANCE)


def table_of(direction: str, times: Iterable[Time], rules: Iterable[dispatch.Rule]) -> Table:
    """Milliseconds of each kernel by each clock, and how near the chosen one comes to the fastest one of CHOICES."""
    rules = list(rules)
    rows = []
    for time in times:
        if time.direction != direction:
            continue
        rule = next(r for r in rules if r.direction == direction and r.holds(time.tokens, time.N * time.K))
        fastest = min(seconds for name, seconds in time.in_a_step.items() if name in dispatch.CHOICES[direction])
        rows.append(
            {
                "layer": f"{time.N} x {time.K}",
                "M": time.tokens,
                **{
                    f"{name}, {heading(clock)}, ms": _milliseconds(seconds, name)
                    for clock, seconds in ((SATURATED, time.saturated), (IN_A_ROW, time.seconds), (ALONE, time.alone))
                    for name in dispatch.KERNELS
                },
                "chosen": rule.kernel,
                "chosen / fastest": time.in_a_step[rule.kernel] / fastest,
                "host moved": steady.shown(time.moved),
            }
        )
    never = [name for name in dispatch.KERNELS if all(name not in choices for choices in dispatch.CHOICES.values())]
    notes = [
        f"bf16, LoRA of rank {RANK}, double quantisation; calls of the op from Python; medians",
        HOW,
        f"{', '.join(dispatch.KERNELS)}: each forced" + (f"; never chosen: {', '.join(never)}" if never else ""),
        f"chosen / fastest: {STEP}",
        steady.NOTE,
    ]
    return Table(direction.capitalize(), rows, notes)


STEP = "by the longer one of host (in a row) and card (saturated), which is what a call adds to a step"


def _milliseconds(seconds: dict[str, float], name: str) -> float | None:
    return 1e3 * seconds[name] if name in seconds else None


# ---- rules ----


def rules_from(times: Iterable[Time], architecture: str, measured_on: str) -> list[dispatch.Rule]:
    """Rules for small layers, then for all: each kernel is used up to the number of tokens where the next is faster.

    A kernel's time is what a call adds to a step: that of the card or of the host, whichever is longer. The times are
    geometric means over the layers of a size. A size that was not measured gets the rules of the other.
    Small layers get no rules of their own if these would be the same.

    >>> early, late = dispatch.CHOICES["backward"]
    >>> for rule in rules_from(
    ...     [Time("backward", 4096, 4096, M, {early: M, late: 96 + M / 2}) for M in (64, 128, 256)]
    ...     + [Time("forward", 4096, 4096, M, {early: 1, late: 2}) for M in (64, 512)],
    ...     "9.0", "X",
    ... ):
    ...     print(rule.direction, rule.kernel == late, rule.most_tokens, rule.why.replace(late, "it"))
    forward False None measured: it takes 2.00 times as long for 64 to 512 tokens; host or card, the longer; X
    backward False 128 measured: it takes 1.25 to 2.00 times as long for 64 to 128 tokens; host or card, the longer; X
    backward True None measured: fused takes 1.14 times as long for 256 tokens; host or card, the longer; X
    """
    rules = []
    times = list(times)
    for direction in dispatch.CHOICES:
        timed = [time for time in times if time.direction == direction]
        small, large = ([t for t in timed if (t.N * t.K <= SMALL) is wanted] for wanted in (True, False))
        of_small, of_all = (ranges(means(group), dispatch.CHOICES[direction]) for group in (small, large or small))
        groups: list[tuple[int | None, dict[str, list[int]], Means]] = [(None, of_all, means(large or small))]
        if small and limits(of_small) != limits(of_all):
            groups.insert(0, (SMALL, of_small, means(small)))
        for most_weights, by_kernel, took in groups:
            for (kernel, most_tokens), tokens in zip(limits(by_kernel), by_kernel.values(), strict=True):
                because = reason(kernel, tokens, took, dispatch.CHOICES[direction])
                why = f"measured: {because}; host or card, the longer; {measured_on}"
                rules.append(dispatch.Rule(architecture, direction, kernel, most_tokens, most_weights, why))
    return rules


Means = dict[int, dict[str, float]]  # by tokens and kernel: geometric means of seconds in a step over layers


def means(times: Iterable[Time]) -> Means:
    """
    >>> means([Time("forward", 64, 64, 1, {"fused": 1.0}), Time("forward", 64, 128, 1, {"fused": 4.0})])
    {1: {'fused': 2.0}}
    """
    logs: dict[int, dict[str, list[float]]] = {}
    for time in times:
        for name, seconds in time.in_a_step.items():
            logs.setdefault(time.tokens, {}).setdefault(name, []).append(math.log(seconds))
    return {
        tokens: {name: math.exp(math.fsum(logarithms) / len(logarithms)) for name, logarithms in kernels.items()}
        for tokens, kernels in sorted(logs.items())
    }


def ranges(took: Means, kernels: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of tokens for each kernel, in the order of `kernels`, without kernels that get none.

    Of all ways to cut the numbers into successive ranges this takes the one with the least geometric mean of the times,
    so that noise in one number does not move a limit far. Of equal ways it takes the one with more for earlier kernels.
    """
    numbers = list(took)

    def cut(places: tuple[int, ...]) -> dict[str, list[int]]:
        edges = [0, *places, len(numbers)]
        return {kernel: numbers[edges[i] : edges[i + 1]] for i, kernel in enumerate(kernels)}

    def cost(places: tuple[int, ...]) -> float:
        return math.fsum(
            math.log(took[tokens].get(kernel, math.inf)) for kernel, part in cut(places).items() for tokens in part
        )

    every = list(combinations_with_replacement(range(len(numbers) + 1), len(kernels) - 1))
    best = min(reversed(every), key=cost)
    return {kernel: part for kernel, part in cut(best).items() if part}


def limits(by_kernel: dict[str, list[int]]) -> list[tuple[str, int | None]]:
    """Each kernel with its largest number of tokens; None for the last one, which has no limit."""
    last = list(by_kernel)[-1:]
    return [(kernel, None if kernel in last else tokens[-1]) for kernel, tokens in by_kernel.items()]


def reason(kernel: str, tokens: Sequence[int], took: Means, kernels: Sequence[str]) -> str:
    """A text that says how much longer the best of the other kernels takes."""
    span = f"for {tokens[0]} to {tokens[-1]} tokens" if len(tokens) > 1 else f"for {tokens[0]} tokens"
    best: dict[int, str] = {}
    for number in tokens:
        if others := [name for name in kernels if name != kernel and name in took[number]]:
            best[number] = min(others, key=took[number].__getitem__)
    if not best:
        return f"nothing else ran {span}"
    ratios = [took[number][name] / took[number][kernel] for number, name in best.items()]
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    names = " or ".join(name for name in kernels if name in best.values())
    return f"{names} takes {low if low == high else f'{low} to {high}'} times as long {span}"
