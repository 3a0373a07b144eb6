"""AdamW's state of one parameter, read from what any optimizer saved, and its moments in 8 and in 32 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4lora import _C

BLOCK = _C.MOMENT_BLOCKSIZE
ZEROS = 127, 0  # the codes of zero: of exp_avg, of exp_avg_sq
BITSANDBYTES = "__bnb_optimizer_quant_state__"  # under which its state_dict() keeps tensors


@dataclass(frozen=True)
class Moments:
    """exp_avg, exp_avg_sq: [n] float32, or uint8 with absmax [ceil(n/256), 2] float32; step counts those taken."""

    step: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    absmax: Tensor | None = None

    def clone(self) -> Moments:
        absmax = None if self.absmax is None else self.absmax.clone()
        return Moments(self.step, self.exp_avg.clone(), self.exp_avg_sq.clone(), absmax)

    def as_bits(self, bits: int) -> Moments:
        """The same in 8 or 32 bits; from 32 to 8 each value goes to the nearest that `encode` takes."""
        if (self.absmax is not None) == (bits == 8):
            return self
        moments = self.exp_avg, self.exp_avg_sq
        if self.absmax is not None:
            decoded = [decode(*each) for each in zip(moments, self.absmax.unbind(1), codes(), strict=True)]
            return replace(self, exp_avg=decoded[0], exp_avg_sq=decoded[1], absmax=None)
        (first, second), absmax = zip(*map(encode, moments, codes(), ZEROS), strict=True)
        return replace(self, exp_avg=first, exp_avg_sq=second, absmax=torch.stack(absmax, dim=1))


def blocks_of(count: int) -> int:
    return -(-count // BLOCK)


def codes() -> tuple[Tensor, Tensor]:
    """The 256 values of each moment's map, ascending."""
    return torch.tensor(_C.NESTED_CODE), torch.tensor(_C.SQUARE_CODE)


def decode(quantized: Tensor, absmax: Tensor, code: Tensor, block: int = BLOCK) -> Tensor:
    """code[q] * absmax: [n] uint8, [ceil(n/block)] float32 -> [n] float32."""
    return code.to(absmax.device)[quantized.int()] * absmax.repeat_interleave(block)[: quantized.numel()]


def encode(values: Tensor, code: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Nearest by magnitude, a tie to the smaller: [n] float32 -> codes, absmax.

    Nothing but zero goes to the zero of exp_avg_sq, whose root divides a step.
    """
    least = 0 if zero else 1  # position of the smallest magnitude that is taken
    above = code[zero + least :].to(values.device)
    padded = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = padded.abs().amax(dim=1)
    x = (padded.abs() / absmax[:, None]).nan_to_num(0.0).view(-1)[: values.numel()]
    k = least + torch.bucketize(x, (above[1:] + above[:-1]) / 2)
    signed = torch.where(values > 0, k, torch.where(values < 0, -k.clamp(max=zero), 0))
    return (zero + signed).to(torch.uint8), absmax


def unwrapped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """All of a state in one dict, where bitsandbytes nests some of it."""
    return {**{name: value for name, value in entry.items() if name != BITSANDBYTES}, **entry.get(BITSANDBYTES, {})}


def read(entry: Mapping[str, Any], count: int, rows: int, mark: Tensor | None, what: str) -> Moments:
    """What torch.optim.AdamW, bitsandbytes' AdamW or PagedAdamW saved for a parameter of `count` values.

    rows: of its absmax, of which the last is `mark` for a shard

    Raises:
        ValueError: it is of another optimizer, or of another parameter; `what` is named.
    """
    entry = unwrapped(entry)
    if "max_exp_avg_sq" in entry:
        raise ValueError(f"PagedAdamW: {what} must be without amsgrad, got max_exp_avg_sq")
    first, second = ("state1", "state2") if "state1" in entry else ("exp_avg", "exp_avg_sq")
    missing = [name for name in ("step", first, second) if name not in entry]
    if missing:
        raise ValueError(
            f"PagedAdamW: {what} must hold step, exp_avg and exp_avg_sq, got {', '.join(map(str, entry)) or 'nothing'}"
        )
    if "unorm_vec" in entry:
        raise ValueError(f"PagedAdamW: {what} must be of an AdamW, got that of a LAMB")
    try:
        step = float(entry["step"])
    except (TypeError, ValueError, RuntimeError):
        step = math.nan
    if not (step >= 0 and step == step // 1):
        raise ValueError(f"PagedAdamW: {what} must count its steps, got {entry['step']}")
    for name in (first, second):
        if not isinstance(entry[name], Tensor):
            raise ValueError(f"PagedAdamW: {what} must hold a tensor in {name}, got {type(entry[name]).__name__}")
        if entry[name].numel() != count:
            raise ValueError(
                f"PagedAdamW: {what} must hold {count} values in {name}, got shape {list(entry[name].shape)}"
            )
    moments = [entry[name].detach().reshape(-1) for name in (first, second)]
    kinds = {each.dtype for each in moments}
    if kinds != {torch.uint8}:
        if torch.uint8 in kinds or not all(kind.is_floating_point for kind in kinds):
            raise ValueError(
                f"PagedAdamW: {what} must hold two moments of floats, or two of uint8, got "
                f"{' and '.join(str(each.dtype) for each in moments)}"
            )
        return Moments(step, moments[0].float(), moments[1].float())
    if first == "state1":
        return _bitsandbytes(step, moments, entry, what)
    absmax = entry.get("absmax")
    alien = mark is not None and absmax is not None and not torch.equal(absmax[-1:].cpu(), mark[None])
    if absmax is None or absmax.shape != (rows, 2) or alien:
        found = "none" if absmax is None else f"shape {list(absmax.shape)}"
        raise ValueError(
            f"PagedAdamW: {what} must hold absmax [{rows}, 2] with its codes, got {found}; 8-bit moments of shards are "
            "loaded by as many processes as saved them"
        )
    return Moments(step, moments[0], moments[1], absmax.detach()[: blocks_of(count)].float())


def _bitsandbytes(step: float, moments: list[Tensor], entry: Mapping[str, Any], what: str) -> Moments:
    if "absmax1" not in entry or "qmap1" not in entry:
        raise ValueError(f"PagedAdamW: {what} must be quantised by blocks (absmax1, qmap1), got {', '.join(entry)}")
    count = moments[0].numel()
    maps = [entry[f"qmap{i}"].float() for i in (1, 2)]
    absmax = torch.stack([entry[f"absmax{i}"].float() for i in (1, 2)], dim=1)
    if len(absmax) == blocks_of(count) and all(map(torch.equal, (each.cpu() for each in maps), codes())):
        return Moments(step, moments[0], moments[1], absmax)
    block = next((size for size in (256, 512, 1024, 2048, 4096) if -(-count // size) == len(absmax)), None)
    if block is None:
        raise ValueError(f"PagedAdamW: {what} must have a scale per 256 to 4096 of {count} values, got {len(absmax)}")
    decoded = [decode(q, a, m, block) for q, a, m in zip(moments, absmax.unbind(1), maps, strict=True)]
    return Moments(step, decoded[0], decoded[1])
