"""The hyperparameters of a parameter group, and which of them are refused."""

from __future__ import annotations

import math
from typing import Any

NAMES = "lr", "betas", "eps", "weight_decay"
REFUSED = "amsgrad", "maximize"  # options of torch.optim.AdamW that would change a step


def hyperparameters_of(group: dict[str, Any]) -> tuple[float, ...]:
    return float(group["lr"]), *map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"])


def check_hyperparameters(group: dict[str, Any]) -> None:
    try:
        two, _ = len(group["betas"]), hyperparameters_of(group)
    except (TypeError, ValueError, RuntimeError):
        given = ", ".join(f"{name} {group[name]!r}" for name in NAMES)
        raise TypeError(
            f"PagedAdamW: lr, eps and weight_decay must be numbers, betas two of them, got {given}"
        ) from None
    require(two == 2, "betas", "two numbers", group["betas"])
    lr, beta1, beta2, eps, weight_decay = hyperparameters_of(group)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        require(0.0 <= value < math.inf, name, "finite and not negative", value)
    for value in (beta1, beta2):
        require(0.0 <= value < 1.0, "betas", "in [0, 1)", value)


def require(holds: bool, what: str, contract: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"PagedAdamW: {what} must be {contract}, got {value}")
