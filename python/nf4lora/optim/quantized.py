"""The moments of one parameter in 8 and in 32 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4lora import _C

BLOCK = _C.MOMENT_BLOCKSIZE
ZEROS = 127, 0  # the codes of zero: of exp_avg, of exp_avg_sq


@dataclass(frozen=True)
class Moments:
    """exp_avg, exp_avg_sq: [n] float32, or uint8 with absmax [ceil(n/256), 2] float32; step: how many were taken."""

    step: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    absmax: Tensor | None = None

    def clone(self) -> Moments:
        absmax = None if self.absmax is None else self.absmax.clone()
        return Moments(self.step, self.exp_avg.clone(), self.exp_avg_sq.clone(), absmax)

    def as_bits(self, bits: int) -> Moments:
        """The moments in 8 or 32 bits; from 32 to 8 bits each value is rounded as `encode` does."""
        if (self.absmax is not None) == (bits == 8):
            return self
        moments = self.exp_avg, self.exp_avg_sq
        if self.absmax is not None:
            decoded = [decode(*arguments) for arguments in zip(moments, self.absmax.unbind(1), codes(), strict=True)]
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
    """The code whose value is nearest by magnitude, the smaller one in a tie: [n] float32 -> codes, absmax.

    In exp_avg_sq only zero gets the code of zero, since a step divides by the root of the value.
    """
    least = 0 if zero else 1  # position of the smallest magnitude that other values may get
    above = code[zero + least :].to(values.device)
    padded = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = padded.abs().amax(dim=1)
    x = (padded.abs() / absmax[:, None]).nan_to_num(0.0).view(-1)[: values.numel()]
    k = least + torch.bucketize(x, (above[1:] + above[:-1]) / 2)
    signed = torch.where(values > 0, k, torch.where(values < 0, -k.clamp(max=zero), 0))
    return (zero + signed).to(torch.uint8), absmax
