"""Which CUDA kernel computes lora_linear and its backward: the rules that csrc/cuda/dispatch.cpp follows.

few      up to 16 rows in 16 bits, forward: the packed weight is streamed once (csrc/cuda/lora_few.cu)
fused    16 bits: tensor cores, W unpacked on the way (csrc/cuda/lora_gemm.cu)
dense    W unpacked into memory, multiplied by torch (csrc/cuda/lora_dense.cpp); takes everything

heuristics.json says which is the fastest: the first rule that matches decides. A card whose architecture it names has
rules of its own; every other card has those of "*". Where the kernel named does not fit the arguments, it is dense.
`python -m bench tune` replaces one architecture's rules by measured ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nf4lora import _C

HEURISTICS = Path(__file__).with_name("heuristics.json")
OTHERS = "*"
FEW_ROWS: int = _C.CUDA_FEW_ROWS
TENSOR_CORES = (torch.bfloat16, torch.float16)  # dtypes
KERNELS: tuple[str, ...] = _C.CUDA_KERNELS
# By direction, in the order in which more tokens favour them.
CHOICES = {"forward": ("few", "fused", "dense"), "backward": ("fused", "dense")}


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

_forced: str | None = None


@contextmanager
def forcing(kernel: str) -> Iterator[None]:
    """Take one of KERNELS inside, to measure it where another would be chosen; in all threads of this process.

    Raises:
        ValueError: not one of KERNELS. Inside, lora_linear raises it where this kernel does not take its arguments.
    """
    global _forced
    before = _forced
    _C.force_cuda_kernel(kernel)
    _forced = kernel
    try:
        yield
    finally:
        _C.force_cuda_kernel(before)
        _forced = before


def forced() -> str | None:
    """The kernel that `forcing` names; None outside it."""
    return _forced


@contextmanager
def workspace(nbytes: int) -> Iterator[None]:
    """Let a call of the dense kernel take so many bytes inside, to unpack W and for copies of x or dy; in all threads.

    Above it W is unpacked a slice at a time. 512 MB otherwise: the largest layer of a model of 70 billion weights,
    28672 x 8192, has 470 MB in 16 bits.
    """
    before = _C.cuda_workspace()
    _C.set_cuda_workspace(nbytes)
    try:
        yield
    finally:
        _C.set_cuda_workspace(before)


def fits(name: str, direction: str, tokens: int, dtype: torch.dtype, out_features: int) -> bool:
    """Whether a kernel takes so many tokens of this dtype."""
    in_features = 64  # any but none
    is_backward = direction == "backward"
    return _C.cuda_kernel_takes(name, is_backward, dtype in TENSOR_CORES, tokens, out_features, in_features)


def kernel_for(architecture: str, direction: str, tokens: int, weights: int) -> str:
    """The kernel that the table has for so many rows of x and a W of so many values, in 16 bits.

    >>> kernel_for("9.0", "forward", 1, 4096 * 4096), kernel_for("3.5", "backward", 8192, 4096 * 4096)
    ('few', 'dense')
    """
    return _C.cuda_kernel_for(number_of(architecture), direction == "backward", tokens, weights)


def number_of(architecture: str) -> int:
    """The compute capability times ten, 0 for "*", as csrc/cuda/dispatch.cpp counts.

    >>> number_of("9.0"), number_of("12.0"), number_of("*")
    (90, 120, 0)
    """
    return 0 if architecture == OTHERS else int(architecture.replace(".", ""))


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


def hand_over(rules: Iterable[Rule]) -> None:
    """Let the CUDA kernels be chosen by these rules from now on, instead of those before."""
    _C.set_cuda_rules(
        [
            (
                number_of(rule.architecture),
                rule.direction == "backward",
                rule.kernel,
                rule.most_tokens,
                rule.most_weights,
            )
            for rule in rules
        ]
    )


def rules() -> list[Rule]:
    """Those of heuristics.json."""
    return [Rule(**line) for line in json.loads(HEURISTICS.read_text())]
