"""What a case returns: a table of plain values, so that a file of results can be printed again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

Cell = Any  # str, bool, int, float, None for "not measured", or a spread: {"median", "low", "high"}


@dataclass
class Table:
    """Rows share their keys, which are the headings. A target is (claim, whether it was met)."""

    title: str
    rows: list[dict[str, Cell]]
    notes: list[str] = field(default_factory=list)
    targets: list[tuple[str, bool]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def markdown(self) -> str:
        """
        >>> print(Table("Speed", [{"layer": "q", "ms": 0.7741}, {"layer": "k", "ms": None}], ["warm"]).markdown())
        **Speed**
        <BLANKLINE>
        | layer | ms    |
        |-------|-------|
        | q     | 0.774 |
        | k     | -     |
        <BLANKLINE>
        - warm
        """
        lines = [f"**{self.title}**", ""]
        if self.rows:
            lines += grid([list(self.rows[0]), *([shown(cell) for cell in row.values()] for row in self.rows)])
        remarks = [f"- {'met' if met else '**missed**'}: {claim}" for claim, met in self.targets]
        remarks += [f"- {note}" for note in self.notes]
        return "\n".join([*lines, *([""] if self.rows and remarks else []), *remarks])


def grid(rows: list[list[str]]) -> Iterable[str]:
    """The lines of a Markdown table, its columns padded so that it reads as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return [head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body]


def shown(cell: Cell) -> str:
    """A cell as text: three significant digits, a spread as `median (low-high)`.

    >>> shown(1234.5), shown(0.000123), shown({"median": 2.0, "low": 1.9, "high": 2.25}), shown(None), shown(True)
    ('1234', '0.000123', '2.00 (1.90-2.25)', '-', 'yes')
    """
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, dict):
        return f"{number(cell['median'])} ({number(cell['low'])}-{number(cell['high'])})"
    return number(cell) if isinstance(cell, float) else str(cell)


def number(value: float) -> str:
    """Three significant digits, never as a power of ten where it can be read without."""
    if value == 0 or not 1e-6 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = 2 - len(str(int(abs(value)))) + 1 if abs(value) >= 1 else None
    if digits is not None:
        return f"{value:.{max(digits, 0)}f}"
    leading = 0
    while abs(value) * 10**leading < 1:
        leading += 1
    return f"{value:.{leading + 2}f}"
