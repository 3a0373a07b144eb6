"""Liger's Triton kernels for what stands between the linear layers: RMSNorm, RoPE and SwiGLU or GeGLU.

Liger replaces the forward of those modules of a loaded model; its MLP calls the linear layers as modules, so that ours
stay. Its cross-entropies are left out: the loss is computed in chunks already (nf4lora.loss). RoPE is a function of
transformers' file for an architecture, which is put back after the run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora.nn.model_tree import base_of, evaluating, unchanged_random_state
from nf4lora.train.errors import RunError

OWN_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
PROBE = 64  # tokens on which both ways are compared
TOLERANCE = 0.1  # of the largest hidden state: 16 bits, rounded at other places in each block


def missing(kind: str) -> str:
    """What Liger needs that is not here, as a sentence; nothing where all is there."""
    if kind != "cuda":
        return "Liger's kernels need a GPU, and this run is on the CPU; use use_liger_kernel false"
    if find_spec("liger_kernel") is None:
        return "it needs the package liger-kernel: pip install liger-kernel"
    if find_spec("triton") is None:
        return "Liger's kernels need the package triton, which torch for CUDA brings along"
    return ""


def unknown(model_type: str) -> str:
    """Says so where Liger has no kernels for this type of model."""
    if model_type in patches():
        return ""
    return f"Liger has no kernels for models of type {model_type}; use use_liger_kernel false"


def patches() -> dict[str, Any]:
    """Liger's function for each type of model that it knows."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


@contextmanager
def liger_kernels(model: nn.Module, ids: list[int]) -> Iterator[None]:
    """Have the model compute with Liger's kernels; afterwards transformers' own functions are back.

    Args:
        ids: of the first training row, on which both ways are compared

    Raises:
        RunError: the model computes something else with them.
    """
    base: Any = base_of(model)
    patch = patches()[base.config.model_type]
    taken = inspect.signature(patch).parameters
    files = {type(module).__module__ for module in base.modules()}
    files = {name for name in files if name.startswith("transformers.models.")}
    before = {name: dict(vars(sys.modules[name])) for name in files}
    row = torch.tensor(ids[:PROBE], device=next(base.parameters()).device)[None]
    wanted = last_hidden_states(base, row)
    try:
        patch(model=base, **{name: value for name, value in OWN_LOSS.items() if name in taken})
        check(last_hidden_states(base, row), wanted, base.config.model_type)
        yield
    finally:
        for name, values in before.items():
            vars(sys.modules[name]).update(values)


def last_hidden_states(base: Any, row: Tensor) -> Tensor:
    with evaluating(base), torch.no_grad(), unchanged_random_state():
        return base.base_model(input_ids=row, use_cache=False).last_hidden_state.float()


def check(got: Tensor, wanted: Tensor, model_type: str) -> None:
    difference, most = (got - wanted).abs().max().item(), TOLERANCE * wanted.abs().max().item()
    if not difference <= most:
        raise RunError(
            f"use_liger_kernel: Liger's kernels must compute what this model of type {model_type} computes, got hidden "
            f"states that differ by {difference:.3g} ({most:.3g} is allowed); use use_liger_kernel false, or another "
            "release of liger-kernel"
        )
