"""Measuring again where the host itself became faster or slower meanwhile.

What a call of a small layer costs on a card is the host's time, and a host whose clock, guests or neighbours change
moves every figure of a row. So the host's own time of a tiny `F.linear` is taken before each round of a measurement and
after the last one. Where it moved by more than a fifth, the row is measured again, three times at most; the steadiest
measurement is kept, and its row says by how much the host moved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch

from .timing import spread

T = TypeVar("T")
MOST = 0.2  # by which the host's time of F.linear may move
TRIES = 3
CALLS, BATCHES = 10, 3  # of F.linear in one look at the host: the fastest batch counts, so that an interrupt does not


class Host:
    """The host's time of F.linear in bf16 with a weight of 64 x 64, without what the device does with it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.x, self.weight = (torch.ones(size, 64, dtype=torch.bfloat16, device=device) for size in (1, 64))
        self.seconds: list[float] = []

    def look(self) -> None:
        """Take its time now."""
        if self.device == "cuda":
            torch.cuda.synchronize()  # a full queue would make the host wait for the card
        with torch.no_grad():
            self.seconds.append(min(self._batch() for _ in range(BATCHES)) / CALLS)

    def _batch(self) -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            torch.nn.functional.linear(self.x, self.weight)
        return time.perf_counter() - start

    def moved(self) -> float:
        """By which share its time moved, between the beginning and the end or between the looks."""
        return movement(self.seconds)


def movement(seconds: list[float]) -> float:
    """By which share times moved: from the first quarter to the last, or from 20 to 80 % of all; the larger one.

    Medians and quantiles, because a single time of many may be that of an interrupt.

    >>> movement([1.0] * 5 + [9.0] + [1.0] * 5), movement([1.0, 1.0, 1.0, 1.0, 1.3]), movement([2.0])
    (0.0, 0.3, 0.0)
    """
    quarter = max(1, len(seconds) // 4)
    first, last = median(seconds[:quarter]), median(seconds[-quarter:])
    over_time = max(first, last) / min(first, last) - 1
    among = spread(seconds)
    return round(max(over_time, among["high"] / among["low"] - 1), 3)


def steadily(measure: Callable[[Callable[[], None]], T], device: str, tries: int | None = None) -> tuple[T, float]:
    """What `measure(look)` returns when the host did not move, and by how much it moved.

    `measure` calls `look` before and after each of its rounds. On a CPU nothing is measured again: there F.linear is a
    contender itself, and the rows show how it moved.
    """
    kept: tuple[T, float] | None = None
    for _ in range(tries or (TRIES if device == "cuda" else 1)):
        host = Host(device)
        result = measure(host.look)
        if kept is None or host.moved() < kept[1]:
            kept = result, host.moved()
        if kept[1] <= MOST:
            break
    assert kept is not None  # there is one try at least
    return kept


def shown(moved: float) -> str:
    """
    >>> shown(0.04), shown(0.31)
    ('4 %', '31 %, unsteady')
    """
    return f"{moved:.0%}".replace("%", " %") + (", unsteady" if moved > MOST else "")


NOTE = (
    "host moved: by how much the host's own time of F.linear moved while a row was measured, from beginning to end or "
    f"between 20 and 80 % of the rounds; a row above {100 * MOST:.0f} % is measured again on a GPU, {TRIES} times at "
    "most, and marked where it stayed unsteady"
)
