"""Which CUDA kernel computes lora_linear and its backward. cuda.py calls it.

few      up to 16 rows in 16 bits, forward: the packed weight is streamed once (csrc/cuda/lora_few.cu)
fused    16 bits: tensor cores, W unpacked on the way (csrc/cuda/lora_gemm.cu)
sliced   a slice of W at a time in 16 bits, multiplied by torch (sliced.py); takes everything
unfused  W whole, multiplied by torch (unfused.py): what the others are measured against, and what takes empty tensors

heuristics.json says which is the fastest: the first rule that matches decides. A card whose architecture it names has
rules of its own; every other card has those of "*". Where the kernel named does not fit the arguments, it is sliced.
`python -m bench tune` replaces one architecture's rules by measured ones.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nf4lora import _C

HEURISTICS = Path(__file__).with_name("heuristics.json")
OTHERS = "*"
FEW_ROWS: int = _C.CUDA_FEW_ROWS
TENSOR_CORES = (torch.bfloat16, torch.float16)  # dtypes
KERNELS = ("few", "fused", "sliced", "unfused")
# By direction, in the order in which more tokens favour them. Never unfused: it needs memory for the whole of W.
CHOICES = {"forward": ("few", "fused", "sliced"), "backward": ("fused", "sliced")}

_forced: str | None = None


@dataclass(frozen=True)
class Rule:
    """One line of heuristics.json.

    architecture: compute capability as "9.0", or "*" for cards without rules of their own
    direction: "forward" or "backward"
    kernel: one of CHOICES[direction]
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


Table = Mapping[tuple[str, str], Sequence[Rule]]  # by architecture and direction


@contextmanager
def forcing(kernel: str) -> Iterator[None]:
    """Take one of KERNELS inside, to measure it where another would be chosen; in all threads of this process."""
    global _forced
    before, _forced = _forced, kernel
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The kernel that `forcing` names; None outside it."""
    return _forced


def chosen(direction: str, rows: Tensor, qweight: Tensor) -> str:
    """The name of the kernel for rows of x, or backward of dy.

    Raises:
        ValueError: inside `forcing` with a kernel that cannot take these arguments.
    """
    if not rows.is_cuda or rows.dim() == 0 or qweight.dim() != 2:
        return "unfused"  # whose check says what is wrong; a CPU tensor comes here in tests alone
    tokens = math.prod(rows.shape[:-1])
    if tokens == 0 or qweight.shape[1] == 0:
        return "unfused"  # torch knows what a sum over nothing is
    out_features = qweight.shape[0]
    if _forced is None:
        name = kernel_for(_architecture(rows.device), direction, tokens, 2 * qweight.numel())
        return name if fits(name, direction, tokens, rows.dtype, out_features) else "sliced"
    able = [name for name in KERNELS if fits(name, direction, tokens, rows.dtype, out_features)]
    if _forced not in able:
        raise ValueError(f"lora_linear: the forced kernel must be one of {', '.join(able)} here, got {_forced!r}")
    return _forced


def fits(name: str, direction: str, tokens: int, dtype: torch.dtype, out_features: int) -> bool:
    """Whether a kernel takes so many tokens of this dtype."""
    if name in ("sliced", "unfused"):
        return True
    if dtype not in TENSOR_CORES:
        return False
    if name == "few":
        return direction == "forward" and tokens <= FEW_ROWS
    return direction == "forward" or (out_features % _C.CUDA_CHUNK == 0 and out_features > 0)  # dy is copied by chunks


def takes_low_rank(rows: Tensor) -> bool:
    """Whether csrc/cuda/lora_grad.cu makes the low-rank products of these rows for sliced; otherwise torch does."""
    return rows.is_cuda and rows.dtype in TENSOR_CORES and rows.shape[1] % _C.CUDA_CHUNK == 0


def kernel_for(architecture: str, direction: str, tokens: int, weights: int) -> str:
    """The kernel that the table has for so many rows of x and a W of so many values, in 16 bits.

    >>> kernel_for("9.0", "forward", 1, 4096 * 4096), kernel_for("3.5", "backward", 8192, 4096 * 4096)
    ('few', 'sliced')
    """
    return first(_table(), architecture, direction, tokens, weights).kernel


def first(table: Table, architecture: str, direction: str, tokens: int, weights: int) -> Rule:
    """The rule that decides."""
    rules = table.get((architecture, direction)) or table[OTHERS, direction]
    return next(rule for rule in rules if rule.holds(tokens, weights))


def by_direction(rules: Iterable[Rule]) -> Table:
    """The rules of each architecture and direction, in their order."""
    table: dict[tuple[str, str], list[Rule]] = {}
    for rule in rules:
        table.setdefault((rule.architecture, rule.direction), []).append(rule)
    return table


@functools.cache
def _table() -> Table:
    return by_direction(Rule(**line) for line in json.loads(HEURISTICS.read_text()))


@functools.cache
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"
