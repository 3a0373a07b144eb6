"""Which kernel a CUDA tensor's lora_linear and its backward take: a table in choice.json, each rule with its reason.

The first rule that matches decides. A card whose architecture the table names has rules of its own; every other card
has those of "*". `python -m bench tune` replaces one architecture's rules by measured ones.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("choice.json")
OTHERS = "*"
# By direction, in the order in which more tokens favour them. Never unfused: it needs memory for the whole of W.
KERNELS = {"forward": ("few", "fused", "sliced"), "backward": ("fused", "sliced")}


@dataclass(frozen=True)
class Rule:
    """One line of choice.json.

    architecture: compute capability as "9.0", or "*" for cards without rules of their own
    direction: "forward" or "backward"
    kernel: one of KERNELS[direction]
    most_tokens: rows of x up to which it holds; None for any number
    most_weights: N * K up to which it holds; None for any number
    why: its reason, a figure in it
    """

    architecture: str
    direction: str
    kernel: str
    most_tokens: int | None
    most_weights: int | None
    why: str

    def holds(self, tokens: int, weights: int) -> bool:
        return (self.most_tokens is None or tokens <= self.most_tokens) and (
            self.most_weights is None or weights <= self.most_weights
        )

    def always(self) -> bool:
        return self.most_tokens is None and self.most_weights is None


Table = Mapping[tuple[str, str], Sequence[Rule]]  # by architecture and direction


def kernel_for(architecture: str, direction: str, tokens: int, weights: int) -> str:
    """The kernel for so many rows of x and a W of so many values; float32 is for cuda.py to sort out.

    >>> kernel_for("9.0", "forward", 1, 4096 * 4096), kernel_for("3.5", "backward", 8192, 4096 * 4096)
    ('few', 'sliced')
    """
    return first(_table(), architecture, direction, tokens, weights).kernel


def first(table: Table, architecture: str, direction: str, tokens: int, weights: int) -> Rule:
    """The rule that decides."""
    rules = table.get((architecture, direction)) or table[OTHERS, direction]
    return next(rule for rule in rules if rule.holds(tokens, weights))


@functools.cache
def _table() -> Table:
    return by_direction(read(PATH))


def by_direction(rules: Iterable[Rule]) -> Table:
    """The rules of each architecture and direction, in their order."""
    table: dict[tuple[str, str], list[Rule]] = {}
    for rule in rules:
        table.setdefault((rule.architecture, rule.direction), []).append(rule)
    return table


def read(path: Path) -> list[Rule]:
    """The rules of a file.

    Raises:
        ValueError: a rule that says nothing sensible, or a direction of an architecture without an answer for all
            shapes.
    """
    lines = json.loads(path.read_text())
    if not isinstance(lines, list):
        raise _wrong("the table", "be a list of rules", type(lines).__name__)
    rules = [_rule(line) for line in lines]
    check(rules)
    return rules


def rewrite(path: Path, architecture: str, rules: Iterable[Rule]) -> None:
    """Replace one architecture's rules and keep the others.

    Raises:
        ValueError: as in read, or a rule of another architecture; the file is then left as it was.
    """
    rules = list(rules)
    for rule in rules:
        if rule.architecture != architecture:
            raise _wrong("architecture", f"be {architecture} in its own rules", repr(rule.architecture))
    others = [rule for rule in read(path) if rule.architecture != architecture]
    # "*" comes last, as it is asked last.
    every = sorted([*others, *rules], key=lambda rule: _order(rule.architecture))
    check(every)
    path.write_text(text(every))
    _table.cache_clear()


def text(rules: Iterable[Rule]) -> str:
    """One line for a rule, so that a diff shows which have changed."""
    return "[\n" + ",\n".join(f"  {json.dumps(asdict(rule))}" for rule in rules) + "\n]\n"


def check(rules: Iterable[Rule]) -> None:
    """Refuse what cannot be a table; raises ValueError as read says."""
    rules = list(rules)
    for rule in rules:
        _check_rule(rule)
    table = by_direction(rules)
    for architecture in [*dict.fromkeys(rule.architecture for rule in rules if rule.architecture != OTHERS), OTHERS]:
        for direction in KERNELS:
            found = table.get((architecture, direction), [])
            if [rule.always() for rule in found] != [False] * (len(found) - 1) + [True]:
                limits = [f"{rule.most_tokens} tokens, {rule.most_weights} weights" for rule in found]
                raise _wrong(
                    f"the last rule of {architecture} {direction}, and no other,",
                    "hold for any tokens and weights",
                    "; ".join(limits) or "no rule",
                )


def _check_rule(rule: Rule) -> None:
    architecture = rule.architecture
    if not isinstance(architecture, str) or not re.fullmatch(rf"\d+\.\d|{re.escape(OTHERS)}", architecture):
        raise _wrong("architecture", f"be a compute capability as '9.0', or '{OTHERS}'", repr(architecture))
    if rule.direction not in KERNELS:
        raise _wrong("direction", f"be one of {', '.join(KERNELS)}", repr(rule.direction))
    if rule.kernel not in KERNELS[rule.direction]:
        raise _wrong("kernel", f"be one of {', '.join(KERNELS[rule.direction])} {rule.direction}", repr(rule.kernel))
    for what, most in (("most_tokens", rule.most_tokens), ("most_weights", rule.most_weights)):
        if most is not None and (type(most) is not int or most < 1):
            raise _wrong(what, "be a positive integer or null", repr(most))
    if rule.kernel == "few" and rule.most_tokens is None:
        raise _wrong("most_tokens", "be a number for few", "None")
    if not isinstance(rule.why, str) or not rule.why.strip():
        raise _wrong("why", "give a reason", repr(rule.why))


def _rule(line: Any) -> Rule:
    names = [field.name for field in fields(Rule)]
    if not isinstance(line, dict) or sorted(line) != sorted(names):
        raise _wrong("a rule", f"have {', '.join(names)}", ", ".join(line) if isinstance(line, dict) else repr(line))
    return Rule(**line)


def _order(architecture: str) -> tuple[bool, list[int]]:
    return (True, []) if architecture == OTHERS else (False, [int(part) for part in architecture.split(".")])


def _wrong(what: str, contract: str, got: str) -> ValueError:
    return ValueError(f"choice.json: {what} must {contract}, got {got}")
