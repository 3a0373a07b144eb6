"""What every case is given, and how it says that it cannot answer.

A case is a module with QUESTION, one sentence, and `run(settings) -> list[Table]`.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# bitsandbytes warns at import that the package `kernels` is absent; each result's environment says that.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

MODEL = Path("models/SmolLM2-135M-Instruct")


@dataclass(frozen=True)
class Settings:
    """quick: sizes that take seconds and mean nothing, to see that everything runs."""

    quick: bool = False
    device: str = "cpu"
    model: Path = MODEL

    def folder(self) -> Path:
        """The folder of the real model."""
        if not (self.model / "config.json").is_file():
            raise Absent(f"no model in {self.model}: python examples/smollm2.py makes it, --model names another")
        return self.model


class Absent(Exception):
    """What a case needs is not on this machine; the message says what, and where it comes from."""


class WrongAnswer(Exception):
    """A contender computed something else than it was asked for: nothing is timed then."""


def installed(package: str) -> bool:
    """Whether a rival can take part."""
    return importlib.util.find_spec(package) is not None


def without(package: str) -> list[str]:
    """The note where a rival cannot take part."""
    return [] if installed(package) else [f"{package} is absent: not compared with"]


def check_equal(who: str, result: Tensor, expected: Tensor) -> None:
    """Bit for bit."""
    if not torch.equal(result, expected):
        raise WrongAnswer(f"{who}: {int((result != expected).sum())} of {result.numel()} values differ")


def check_close(who: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest difference, as a share of the largest value."""
    error = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
    if not error <= tolerance:
        raise WrongAnswer(f"{who}: off by {error:.2g} of the largest value, {tolerance:.2g} is allowed")
