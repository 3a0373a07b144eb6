"""One layer, or group of layers, measured at one number of tokens: a row of the tables of the case lora on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..harness import steady
from ..harness.layers import OURS
from ..harness.shapes import Group, Shape
from ..harness.timing import SATURATED, Timing, heading

KINDS = {"forward": "forward", "both": "forward and backward"}

Took = dict[str, dict[str, Timing]]  # by clock and contender


@dataclass(frozen=True)
class Row:
    """One layer, or group, at one number of tokens; kind is one of KINDS, moved how unsteady the host was."""

    shape: Shape | Group
    M: int
    kind: str
    took: Took
    moved: float

    def medians(self, clock: str) -> dict[str, float]:
        return {name: timing.median for name, timing in self.took[clock].items()}


def described(row: Row, names: Sequence[str], clocks: Sequence[str]) -> dict:
    """A row of a table: our three times, then each rival's three ratios."""
    cells: dict = {"layer": row.shape.name, "M": row.M}
    for clock in clocks:
        cells[f"{heading(clock)}, ms"] = row.took[clock][OURS].spread()
    if SATURATED in clocks:
        products = 2 if row.kind == "both" else 1  # y = x W^T, dx = dy W
        flops = 2 * row.M * products * row.shape.weights
        cells["TFLOP/s, saturated"] = flops / row.took[SATURATED][OURS].median / 1e12
    for rival in names[1:]:
        for clock in clocks:
            took = row.took[clock]
            cells[ratio_of(clock, rival)] = took[OURS].over(took[rival]) if rival in took else None
    cells["host moved"] = steady.shown(row.moved)
    return cells


def ratio_of(clock: str, rival: str) -> str:
    return f"{heading(clock)}: ours / {rival}"
