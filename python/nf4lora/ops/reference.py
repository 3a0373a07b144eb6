"""The ops again in plain torch: slow, obvious, the specification. Only tests and bench import it.

`acc` is the dtype in which sums are kept: float32 repeats the arithmetic of the kernels, float64 gives the truth
to measure them against.
"""

import math
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4lora.ops.arguments import LoraLinear, LoraLinearBackward

# QLoRA, arXiv:2305.14314, appendix E; the values that bitsandbytes stores. Written down a second time on purpose.
CODE = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
NESTED_BLOCKSIZE = 256


def linspace(steps: int) -> Tensor:
    """torch.linspace(0.1, 1, steps) as it is where fused multiply-adds are used, on any processor: [steps] float32."""
    low, high = torch.tensor(0.1), torch.tensor(1.0)
    step = ((high - low) / (steps - 1)).double()  # a float32 times a small integer is exact in float64
    up, down = low + step * torch.arange(steps), high - step * torch.arange(steps - 1, -1, -1)
    return torch.cat([up[: steps // 2], down[steps // 2 :]]).float()


def nested_code() -> Tensor:
    """Signed dynamic 8-bit map (bitsandbytes `create_dynamic_map`): [256] float32, ascending, zero at index 127."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = linspace(2**i + 1)
        means = 10.0 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values))


def nearest(values: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest entry of an ascending code; a tie takes the lower index."""
    midpoints = (code[1:] + code[:-1]) / 2
    return torch.bucketize(values, midpoints.to(values.device), right=False)


def nf4_quantize(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """[..., K] -> packed codes uint8 [..., K/2], absmax float32 [..., K/blocksize]."""
    *lead, K = weight.shape
    blocks = weight.float().reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if blocks.numel() else blocks.new_empty(0)
    inverse = 1.0 / absmax.clamp(min=1e-38)
    codes = nearest(blocks * inverse[:, None], CODE).to(torch.uint8).reshape(-1, 2)
    return (codes[:, 0] << 4 | codes[:, 1]).reshape(*lead, K // 2), absmax.reshape(*lead, K // blocksize)


def nf4_dequantize(qweight: Tensor, absmax: Tensor, blocksize: int = 64, dtype=torch.bfloat16) -> Tensor:
    """round_to_dtype(code[q] * absmax): one float32 multiply, one rounding."""
    *lead, half = qweight.shape
    codes = torch.stack([qweight >> 4, qweight & 15], dim=-1).reshape(-1, blocksize).long()
    weight = CODE.to(qweight.device)[codes] * absmax.reshape(-1, 1)
    return weight.to(dtype).reshape(*lead, 2 * half)


def absmax_quantize(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """[...] float32 -> codes uint8 [...], nested float32 [ceil(n/256) + 1]: one absmax per 256, the offset last."""
    flat = absmax.reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % NESTED_BLOCKSIZE)).reshape(-1, NESTED_BLOCKSIZE)
    sums = [reduce(add, block) for block in blocks.double().tolist()]  # not sum(): Python 3.12 compensates there
    offset = torch.tensor(reduce(add, sums, 0.0) / max(len(flat), 1), dtype=torch.float32)
    centred = F.pad(flat - offset, (0, -len(flat) % NESTED_BLOCKSIZE)).reshape(-1, NESTED_BLOCKSIZE)
    nested_absmax = centred.abs().amax(dim=1) if len(flat) else flat
    if not offset.isfinite():
        raise ValueError("absmax_quantize: absmax must be finite, got NaN or Inf")
    if not nested_absmax.isfinite().all():
        block = int(nested_absmax.isfinite().int().argmin())
        raise ValueError(
            "absmax_quantize: absmax must lie within 3.4e38 of its mean, got values further away in block "
            f"{block} (flat elements from {block * NESTED_BLOCKSIZE})"
        )
    scaled = centred / nested_absmax[:, None]
    codes = nearest(scaled.where(nested_absmax[:, None] > 0, torch.zeros(())), nested_code())
    return codes.to(torch.uint8).flatten()[: len(flat)].reshape(absmax.shape), torch.cat([nested_absmax, offset[None]])


def absmax_dequantize(absmax_q: Tensor, nested: Tensor) -> Tensor:
    """RN(RN(map[q] * nested_absmax) + offset): two roundings, never a fused multiply-add."""
    scale = nested[:-1].repeat_interleave(NESTED_BLOCKSIZE)[: absmax_q.numel()]
    product = nested_code().to(absmax_q.device)[absmax_q.flatten().long()] * scale
    return (product + nested[-1]).reshape(absmax_q.shape)


def philox(seed: int, count: int) -> Tensor:
    """Words 0 .. count-1 of Philox4x32-10 (Salmon et al., SC'11): [count] int64 below 2^32.

    Word i is word i % 4 of the block whose counter is (low 32 bits of i // 4, high 32 bits, 0, 0) and whose key is
    (low 32 bits of the seed, high 32 bits).
    """
    mask = 0xFFFFFFFF
    block = torch.arange((count + 3) // 4)
    c = [block & mask, block >> 32, torch.zeros_like(block), torch.zeros_like(block)]
    key = [seed & mask, (seed >> 32) & mask]

    def multiply(constant, word):  # 32 x 32 -> (high, low); int64 products would overflow, so by 16-bit halves
        low = constant * (word & 0xFFFF)
        high = constant * (word >> 16) + (low >> 16)
        return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)

    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c[0])
        high1, low1 = multiply(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return torch.stack(c, dim=1).flatten()[:count]


def dropout_mask(M: int, K: int, dropout: float, seed: Tensor) -> Tensor:
    """bool [M, K], True where kept: word(row * K + column) >= dropout * 2^32, rounded half up, below 2^32."""
    threshold = min(int(dropout * 2**32 + 0.5), 2**32 - 1)
    return (philox(int(seed), M * K) >= threshold).reshape(M, K)


def kept(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is True, else zero: a product with the mask would make NaN of a dropped infinity."""
    return torch.where(mask, values, values.new_zeros(()))


def _operands(a, x, acc):
    """What forward and backward share, in the accumulation dtype: x and W as 2-D, A and B rounded to x's dtype."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 could be any number where K is 0
    absmax = a.absmax if a.nested is None else absmax_dequantize(a.absmax, a.nested)
    W = nf4_dequantize(a.qweight, absmax, a.blocksize, x.dtype).to(acc)
    A, B = (None if p is None else p.to(x.dtype).to(acc) for p in (a.lora_A, a.lora_B))
    mask = torch.ones((), dtype=torch.bool, device=x.device)
    if a.dropout > 0 and A is not None:
        mask = dropout_mask(rows.shape[0], rows.shape[1], a.dropout, a.seed).to(x.device)
    return rows.to(acc), W, A, B, mask, 1.0 / (1.0 - a.dropout)


def lora_linear(*arguments, acc=torch.float32, **options):
    """y = x W^T + bias + scaling * S B^T with S = dropout(x) A^T rounded to x's dtype: y [..., N], S [M, R].

    The arguments are those of LoraLinear.
    """
    a = LoraLinear(*arguments, **options)
    rows, W, A, B, mask, inverse_keep = _operands(a, a.x, acc)
    y = rows @ W.T
    S = rows.new_empty(len(rows), 0)
    if A is not None:
        S = ((kept(rows, mask) @ A.T) * inverse_keep).to(a.x.dtype)
        y = y + a.scaling * (S.to(acc) @ B.T)
    if a.bias is not None:
        y = y + a.bias.to(acc)
    return y.to(a.x.dtype).reshape(*a.x.shape[:-1], len(W)), S.to(a.x.dtype)


def lora_linear_backward(*arguments, acc=torch.float32, **options):
    """dx = dy W + mask/(1-p) * scaling * T A, dA = scaling/(1-p) * T^T (mask x), dB = scaling * dy^T S; T = dy B.

    The arguments are those of LoraLinearBackward; all three gradients are made.
    """
    a: Any = LoraLinearBackward(*arguments, **options)
    dtype = a.x.dtype
    rows, W, A, B, mask, inverse_keep = _operands(a, a.x, acc)
    grad = a.dy.reshape(len(rows), a.dy.shape[-1]).to(acc)
    dx = grad @ W
    if A is None:
        return dx.to(dtype).reshape(a.x.shape), None, None
    T = (grad @ B).to(dtype).to(acc)
    dx = dx + kept(a.scaling * inverse_keep * (T @ A), mask)
    dA = a.scaling * inverse_keep * (T.T @ kept(rows, mask))
    dB = a.scaling * (grad.T @ a.S.to(acc))
    return dx.to(dtype).reshape(a.x.shape), dA.to(a.lora_A.dtype), dB.to(a.lora_B.dtype)


def lora_linear_group(x, qweight, absmax, nested, bias, lora_A, lora_B, scaling, blocksize):
    """lora_linear of each layer of a group: lists of y and of S. The arguments are those of the op."""
    layers = zip(qweight, absmax, nested, bias, lora_A, lora_B, strict=True)
    results = [lora_linear(x, *layer, scaling, 0.0, None, blocksize) for layer in layers]
    return [y for y, _ in results], [S for _, S in results]


def lora_linear_group_backward(dy, x, S, qweight, absmax, nested, lora_A, lora_B, scaling, blocksize):
    """lora_linear_backward of each layer of a group: dx is the sum of all, rounded once; lists of dA and dB."""
    layers = zip(dy, S, qweight, absmax, nested, lora_A, lora_B, strict=True)
    results = [
        lora_linear_backward(gradient, x, low_rank, *layer, scaling, 0.0, None, blocksize)
        for gradient, low_rank, *layer in layers
    ]
    dx = sum(part.float() for part, _, _ in results).to(x.dtype)
    return dx, [dA for _, dA, _ in results], [dB for _, _, dB in results]


def square_code() -> Tensor:
    """Unsigned dynamic 8-bit map (`create_dynamic_map(signed=False)`): [256] float32, ascending from zero."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = linspace(2 ** (i + 1) + 1)
        values += (10.0 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
    return torch.tensor(sorted(values))


def moment_decode(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """code[q] * absmax, one rounding: codes [n] uint8, absmax [ceil(n/256)] -> [n] float32."""
    return code[codes.long()] * absmax.repeat_interleave(256)[: codes.numel()]


def moment_encode(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest values by magnitude, a tie the smaller: [n] -> codes, absmax.

    Of the unsigned map, no value but zero becomes zero.
    """
    padded = F.pad(values, (0, -values.numel() % 256)).reshape(-1, 256)
    absmax = padded.abs().amax(dim=1)
    zero = int((code == 0).nonzero())
    least = 0 if zero else 1
    above = code[zero + least :]
    x = (padded.abs() / absmax[:, None]).nan_to_num(0.0).reshape(-1)[: values.numel()]
    k = least + torch.bucketize(x, (above[1:] + above[:-1]) / 2)
    codes = zero + torch.where(values > 0, k, torch.where(values < 0, -k.clamp(max=zero), 0))
    return codes.to(torch.uint8), absmax


def moment_drop() -> Tensor:
    """By code of the signed map: half the way to the next smaller magnitude, and a sixteenth more, as a bfloat16 that
    is rounded towards zero: [256] float32."""
    code = nested_code()
    smaller = torch.cat([code[1:128], code[127:128], code[127:255]])
    drop = (code - smaller) / 2 * 1.0625
    return (drop.view(torch.int32) & -0x10000).view(torch.float32)


def adamw_step(
    param, grad, exp_avg, exp_avg_sq, absmax=None, scale=1.0,
    lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, step=1,
):  # fmt: skip
    """One step on one flat tensor: new param, exp_avg, exp_avg_sq, absmax, and how many gradients were not finite.

    Each line is one operation of torch.optim.AdamW's single-tensor path as torch's CPU kernels round it; fused
    multiply-adds are taken in float64, where the product of two float32 is exact. Moments of 8 bits add one line: an
    exp_avg whose gradient has ended shrinks enough for its code to change.
    """

    def fma(a, b, c):
        return (a.double() * b.double() + c.double()).float()

    def number(value):
        return torch.tensor(value, dtype=torch.float32)

    p, g = param.float(), grad.float() * number(scale)
    first, second = exp_avg, exp_avg_sq
    if absmax is not None:
        first, second = (moment_decode(q, a, c) for q, a, c in zip((first, second), absmax.T, MOMENT_CODES))
    weight = number(1 - beta1)
    base, weight = (first, weight) if weight < 0.5 else (g, weight - 1)
    new_first = fma(weight, g - first, base)
    new_second = fma(number(1 - beta2) * g, g, second * number(beta2))
    if absmax is not None:
        lowered = first - moment_drop()[exp_avg.long()] * absmax[:, 0].repeat_interleave(256)[: first.numel()]
        ended = g.abs() < number(min(0.5, 4 * (1 - beta1))) * first.abs()
        new_first = torch.where(ended & (lowered.abs() < new_first.abs()), lowered, new_first)
        most = torch.finfo(torch.float32).max
        new_first, new_second = new_first.clamp(-most, most), new_second.clamp(max=most)
    root = new_second.double().sqrt().float()  # correctly rounded; MKL's float32 root is not
    denominator = root / number((1 - beta2**step) ** 0.5) + number(eps)
    new = p * number(1 - lr * weight_decay) + number(-lr / (1 - beta1**step)) * new_first / denominator
    kept = torch.isfinite(g)
    param = torch.where(kept, new, p).to(param.dtype)
    first, second = torch.where(kept, new_first, first), torch.where(kept, new_second, second)
    if absmax is not None:
        encoded = [moment_encode(values, code) for values, code in zip((first, second), MOMENT_CODES)]
        (first, second), absmax = (q for q, _ in encoded), torch.stack([a for _, a in encoded], dim=1)
    return param, first, second, absmax, int((~kept).sum())


MOMENT_CODES = nested_code(), square_code()
