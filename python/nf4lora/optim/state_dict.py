"""Reading what PagedAdamW, torch.optim.AdamW and bitsandbytes' AdamW save: a parameter's state, and a group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nf4lora.optim.hyperparameters import NAMES, REFUSED, check_hyperparameters
from nf4lora.optim.quantized import Moments, blocks_of, codes, decode

BITSANDBYTES = "__bnb_optimizer_quant_state__"  # the key under which its state_dict() keeps tensors
DROPPED = {  # keys in the groups of torch's and bitsandbytes' AdamW that have no meaning here
    *REFUSED, "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay",
    "alpha", "t_alpha", "t_beta3",
}  # fmt: skip


def unwrapped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state in one dict; bitsandbytes nests some of them in a second one."""
    return {**{name: value for name, value in entry.items() if name != BITSANDBYTES}, **entry.get(BITSANDBYTES, {})}


def read_state(entry: Mapping[str, Any], count: int, rows: int, tag: Tensor | None, what: str) -> Moments:
    """The moments that torch.optim.AdamW, bitsandbytes' AdamW or PagedAdamW saved for a parameter of `count` values.

    Args:
        rows: of the parameter's absmax
        tag: for a shard, the last of these rows (`dtensor.shard_size_tag`)
        what: the name of the state in error texts

    Raises:
        ValueError: the state is of another optimizer, or of another parameter.
    """
    entry = unwrapped(entry)
    if "max_exp_avg_sq" in entry:
        raise ValueError(f"PagedAdamW: {what} must not use amsgrad, which is not supported, got max_exp_avg_sq")
    first, second = ("state1", "state2") if "state1" in entry else ("exp_avg", "exp_avg_sq")
    missing = [name for name in ("step", first, second) if name not in entry]
    if missing:
        raise ValueError(
            f"PagedAdamW: {what} must hold step, exp_avg and exp_avg_sq, got {', '.join(map(str, entry)) or 'nothing'}"
        )
    if "unorm_vec" in entry:
        raise ValueError(f"PagedAdamW: {what} must come from an AdamW, got that of a LAMB")
    try:
        step = float(entry["step"])
    except (TypeError, ValueError, RuntimeError):
        step = math.nan
    if not (step >= 0 and step == step // 1):
        raise ValueError(f"PagedAdamW: {what} must have a whole number as step, got {entry['step']}")
    for name in (first, second):
        if not isinstance(entry[name], Tensor):
            raise ValueError(f"PagedAdamW: {what} must hold a tensor in {name}, got {type(entry[name]).__name__}")
        if entry[name].numel() != count:
            raise ValueError(
                f"PagedAdamW: {what} must hold {count} values in {name}, got shape {list(entry[name].shape)}"
            )
    moments = [entry[name].detach().reshape(-1) for name in (first, second)]
    kinds = {moment.dtype for moment in moments}
    if kinds != {torch.uint8}:
        if torch.uint8 in kinds or not all(kind.is_floating_point for kind in kinds):
            raise ValueError(
                f"PagedAdamW: {what} must hold two moments of floats, or two of uint8, got "
                f"{' and '.join(str(moment.dtype) for moment in moments)}"
            )
        return Moments(step, moments[0].float(), moments[1].float())
    if first == "state1":
        return _bitsandbytes(step, moments, entry, what)
    absmax = entry.get("absmax")
    alien = tag is not None and absmax is not None and not torch.equal(absmax[-1:].cpu(), tag[None])
    if absmax is None or absmax.shape != (rows, 2) or alien:
        actual = "none" if absmax is None else f"shape {list(absmax.shape)}"
        raise ValueError(
            f"PagedAdamW: {what} must hold absmax [{rows}, 2] with its codes, got {actual}; 8-bit moments of shards "
            "are loaded by as many processes as saved them"
        )
    return Moments(step, moments[0], moments[1], absmax.detach()[: blocks_of(count)].float())


def _bitsandbytes(step: float, moments: list[Tensor], entry: Mapping[str, Any], what: str) -> Moments:
    if "absmax1" not in entry or "qmap1" not in entry:
        raise ValueError(f"PagedAdamW: {what} must be quantised by blocks (absmax1, qmap1), got {', '.join(entry)}")
    count = moments[0].numel()
    maps = [entry[f"qmap{i}"].float() for i in (1, 2)]
    absmax = torch.stack([entry[f"absmax{i}"].float() for i in (1, 2)], dim=1)
    if len(absmax) == blocks_of(count) and all(map(torch.equal, (values.cpu() for values in maps), codes())):
        return Moments(step, moments[0], moments[1], absmax)
    block = next((size for size in (256, 512, 1024, 2048, 4096) if -(-count // size) == len(absmax)), None)
    if block is None:
        raise ValueError(f"PagedAdamW: {what} must have a scale per 256 to 4096 of {count} values, got {len(absmax)}")
    decoded = [decode(q, a, m, block) for q, a, m in zip(moments, absmax.unbind(1), maps, strict=True)]
    return Moments(step, decoded[0], decoded[1])


def read_group(group: dict[str, Any], index: int) -> dict[str, Any]:
    """A saved group without the keys that only other optimizers use."""
    what = f"PagedAdamW: group {index} of the state dict"
    missing = [name for name in NAMES if name not in group]
    if missing:
        raise ValueError(f"{what} must come from an AdamW, got one without {', '.join(missing)}")
    if "momentum_decay" in group or ("foreach" in group and "amsgrad" not in group):
        raise ValueError(f"{what} must come from an AdamW, got that of a NAdam or a RAdam")
    for name in REFUSED:
        if group.get(name):
            raise ValueError(f"{what} must not use {name}, which is not supported, got {group[name]}")
    if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
        raise ValueError(f"{what} must have a decoupled weight decay, got Adam's {group['weight_decay']}")
    hyperparameters = {name: value for name, value in group.items() if name not in DROPPED}
    check_hyperparameters(hyperparameters)
    return hyperparameters
