"""The settings of a case, its errors, and checks of answers.

A case is a module with QUESTION, one sentence, and `run(settings) -> list[Table]`.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .timing import NAMES as CLOCK_NAMES

# bitsandbytes warns at import if the package `kernels` is absent; the environment in each result records that.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

MODEL = Path("models/SmolLM2-135M-Instruct")


@dataclass(frozen=True)
class Settings:
    """What a run was asked for.

    quick: tiny sizes that take seconds, to test that a case runs; their figures mean nothing
    clocks: which of timing.CLOCKS the tables of a GPU have
    seconds: a case of a GPU that has many rows begins none after so many; None for no limit
    """

    quick: bool = False
    device: str = "cpu"
    model: Path = MODEL
    clocks: tuple[str, ...] = CLOCK_NAMES
    seconds: float | None = None

    def folder(self) -> Path:
        """The folder of the real model."""
        if not (self.model / "config.json").is_file():
            raise Absent(f"no model in {self.model}: python examples/smollm2.py makes it, --model names another")
        return self.model


class Absent(Exception):
    """Something that a case needs is not on this machine; the message says what, and where to get it."""


class WrongAnswer(Exception):
    """A contender computed a wrong result; nothing is timed then."""


def installed(package: str) -> bool:
    """Whether a rival's package is installed."""
    return importlib.util.find_spec(package) is not None


def without(package: str) -> list[str]:
    """A note for the table, if a rival's package is not installed."""
    return [] if installed(package) else [f"{package} is absent: not compared with"]


def check_equal(who: str, result: Tensor, expected: Tensor) -> None:
    """Require equal bits."""
    if not torch.equal(result, expected):
        raise WrongAnswer(f"{who}: {int((result != expected).sum())} of {result.numel()} values differ")


def check_close(who: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Require that the largest difference is at most `tolerance` times the largest value."""
    error = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
    if not error <= tolerance:
        raise WrongAnswer(f"{who}: off by {error:.2g} of the largest value, {tolerance:.2g} is allowed")
