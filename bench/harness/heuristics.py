"""Reading, checking and rewriting the table of rules that choose a CUDA kernel."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nf4lora.ops.kernels import dispatch
from nf4lora.ops.kernels.dispatch import CHOICES, OTHERS, Rule, by_direction


def read_rules(path: Path) -> list[Rule]:
    """The rules of a file.

    Raises:
        ValueError: a rule is not valid, or the rules of a direction and architecture do not cover all shapes.
    """
    lines = json.loads(path.read_text())
    if not isinstance(lines, list):
        raise _wrong("the table", "be a list of rules", type(lines).__name__)
    rules = [_rule(line) for line in lines]
    check_rules(rules)
    return rules


def rewrite(path: Path, architecture: str, rules: Iterable[Rule]) -> None:
    """Replace one architecture's rules and keep the others.

    Raises:
        ValueError: as in read_rules, or a rule of another architecture; the file is then left as it was.
    """
    rules = list(rules)
    for rule in rules:
        if rule.architecture != architecture:
            raise _wrong("architecture", f"be {architecture} in its own rules", repr(rule.architecture))
    others = [rule for rule in read_rules(path) if rule.architecture != architecture]
    # "*" comes last, as it is asked last.
    every = sorted([*others, *rules], key=lambda rule: _order(rule.architecture))
    check_rules(every)
    path.write_text(text(every))
    dispatch.hand_over(every)


def text(rules: Iterable[Rule]) -> str:
    """The table as JSON with one line for each rule, so that a diff shows which have changed."""
    return "[\n" + ",\n".join(f"  {json.dumps(asdict(rule))}" for rule in rules) + "\n]\n"


def check_rules(rules: Iterable[Rule]) -> None:
    """Refuse rules that do not form a table; raises ValueError as read_rules says."""
    rules = list(rules)
    for rule in rules:
        _check_rule(rule)
    table = by_direction(rules)
    for architecture in [*dict.fromkeys(rule.architecture for rule in rules if rule.architecture != OTHERS), OTHERS]:
        for direction in CHOICES:
            entries = table.get((architecture, direction), [])
            if [_always(rule) for rule in entries] != [False] * (len(entries) - 1) + [True]:
                limits = [f"{rule.most_tokens} tokens, {rule.most_weights} weights" for rule in entries]
                raise _wrong(
                    f"the last rule of {architecture} {direction}, and no other,",
                    "hold for any tokens and weights",
                    "; ".join(limits) or "no rule",
                )


def _always(rule: Rule) -> bool:
    return rule.most_tokens is None and rule.most_weights is None


def _check_rule(rule: Rule) -> None:
    architecture = rule.architecture
    if not isinstance(architecture, str) or not re.fullmatch(rf"\d+\.\d|{re.escape(OTHERS)}", architecture):
        raise _wrong("architecture", f"be a compute capability as '9.0', or '{OTHERS}'", repr(architecture))
    if rule.direction not in CHOICES:
        raise _wrong("direction", f"be one of {', '.join(CHOICES)}", repr(rule.direction))
    if rule.kernel not in CHOICES[rule.direction]:
        raise _wrong("kernel", f"be one of {', '.join(CHOICES[rule.direction])} {rule.direction}", repr(rule.kernel))
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
    return ValueError(f"heuristics.json: {what} must {contract}, got {got}")
