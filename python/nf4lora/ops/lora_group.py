"""lora_group: frozen 4-bit linear layers of the same input, each with its LoRA branch, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nf4lora import _C
from nf4lora.compat.torch import below_autograd
from nf4lora.ops.arguments import LoraLinearBackward
from nf4lora.ops.kernels.kept_weights import keep_if_computed_again
from nf4lora.ops.lora import called
from nf4lora.ops.nf4 import BLOCKSIZE

_ops = torch.ops.nf4lora
MOST_SIBLINGS: int = _C.MOST_SIBLINGS


class Layers(NamedTuple):
    """What the layers of a group have besides x: lists with one entry a layer, in the order of the op's schema."""

    qweight: Sequence[Tensor]
    absmax: Sequence[Tensor]
    nested: Sequence[Tensor | None]
    bias: Sequence[Tensor | None]
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: float = 1.0
    blocksize: int = BLOCKSIZE


def lora_linear_group(x: Tensor, layers: Layers) -> tuple[Tensor, ...]:
    """`lora_linear` of each of the layers, which share x, one scaling and one blocksize and have no dropout.

    On a card S is made by one pass over x for all layers, the dA by another, and dx is summed within the products with
    the weights, so that its bits may differ from those of single calls; on a CPU they are the same.

    Args:
        x: [..., K] float32, bfloat16 or float16
        layers: 1 to MOST_SIBLINGS; all or none of the lora_A train, and all or none of the lora_B

    Returns:
        y of each layer: [..., N] of x's dtype

    Raises:
        ValueError, TypeError: as lora_linear; lists of different lengths, or of too many layers.

    Source: one autograd node for q, k and v, and for gate and up, is how Unsloth does it, in patched models.

    >>> qweight, absmax = nf4lora.ops.nf4_quantize(torch.eye(64)[:3])
    >>> A, B = torch.zeros(1, 64), torch.zeros(3, 1)
    >>> layers = Layers([qweight] * 2, [absmax] * 2, [None] * 2, [None] * 2, [A, A], [B, B])
    >>> lora_linear_group(torch.arange(64.0), layers)
    (tensor([0., 1., 2.]), tensor([0., 1., 2.]))
    """
    wants_gradient = x.requires_grad or any(f.requires_grad for f in (*layers.lora_A, *layers.lora_B))
    if torch.is_grad_enabled() and wants_gradient:
        return _Differentiable.apply(x, layers, *layers.lora_A, *layers.lora_B)
    with below_autograd():
        return tuple(called(_ops.lora_linear_group.default, (x, *layers))[0])


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Layers, *factors: Tensor) -> tuple[Tensor, ...]:
        count = len(layers.qweight)
        if x.is_cuda:
            keep_if_computed_again(x)
        with below_autograd():
            ys, S = called(_ops.lora_linear_group.default, (x, *layers))
        _, _, *wanted = ctx.needs_input_grad
        ctx.set_materialize_grads(False)  # of an output that nobody has used
        ctx.count, ctx.scaling, ctx.blocksize = count, layers.scaling, layers.blocksize
        ctx.unused, ctx.kept = set(range(count)), None
        # As in lora_linear: x matters to the dA alone and S to the dB.
        ctx.save_for_backward(
            x if wanted[0] else None,
            *(S if wanted[-1] else [None] * count),
            *layers.qweight,
            *layers.absmax,
            *layers.nested,
            *factors,
        )
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        count = ctx.count
        x, *saved = _saved(ctx, {i for i in range(count) if dys[i] is not None})
        S, qweight, absmax, nested, A, B = (saved[i : i + count] for i in range(0, 6 * count, count))
        need_dx, _, *wanted = ctx.needs_input_grad
        if any(dy is None for dy in dys):
            dx, dA, dB = _of_those_used(ctx, dys, x, S, qweight, absmax, nested, A, B)
        else:
            S = [] if S[0] is None else S
            factors = (qweight, absmax, nested, A, B)
            arguments = (list(dys), x, S, *factors, ctx.scaling, ctx.blocksize, need_dx)
            dx, dA, dB = called(_ops.lora_linear_group_backward.default, arguments)
        gradients = (gradient if is_wanted else None for gradient, is_wanted in zip((*dA, *dB), wanted, strict=True))
        return dx if need_dx else None, None, *gradients


def _saved(ctx: Any, used: set[int]) -> tuple[Tensor | None, ...]:
    """The saved tensors, for a backward pass from these outputs.

    Layers that compute themselves have graphs of their own: a backward pass from one of them leaves the others'. So
    what is saved is kept here for the outputs that no backward pass has come from.
    """
    saved = ctx.kept if ctx.kept is not None and used <= ctx.unused else ctx.saved_tensors
    ctx.unused -= used
    ctx.kept = saved if ctx.unused else None
    return saved


def _of_those_used(ctx: Any, dys: Sequence[Tensor | None], x: Tensor | None, *lists: Any) -> tuple[Any, list, list]:
    """dx, the dA and the dB of the layers whose output has a gradient, which are called one by one."""
    total: Tensor | None = None
    dA, dB = [None] * len(dys), [None] * len(dys)
    for i in reversed(range(len(dys))):
        dy = dys[i]
        if dy is None:
            continue
        S, qweight, absmax, nested, A, B = (values[i] for values in lists)
        numbers = {"scaling": ctx.scaling, "blocksize": ctx.blocksize, "need_dx": ctx.needs_input_grad[0]}
        arguments = LoraLinearBackward(dy, x, S, qweight, absmax, nested, A, B, **numbers)
        dx, dA[i], dB[i] = called(_ops.lora_linear_backward.default, arguments)
        total = dx if total is None else total.add_(dx)
    return total, dA, dB


@torch.library.register_fake("nf4lora::lora_linear_group")
def _(x, qweight, absmax, nested, bias, lora_A, lora_B, scaling, blocksize):
    *lead, _ = x.shape
    tokens = 1
    for size in lead:
        tokens = tokens * size
    ys = [x.new_empty([*lead, codes.shape[0]]) for codes in qweight]
    return ys, [x.new_empty([tokens, A.shape[0]]) for A in lora_A]


@torch.library.register_fake("nf4lora::lora_linear_group_backward")
def _(dy, x, S, qweight, absmax, nested, lora_A, lora_B, scaling, blocksize, need_dx):
    like = dy[0]
    shape = [*like.shape[:-1], 2 * qweight[0].shape[1]] if x is None else x.shape
    dx = like.new_empty(shape if need_dx else [0])
    dA, dB = (
        [factor.new_empty(factor.shape) if wanted else like.new_empty([0], dtype=torch.float32) for factor in factors]
        for factors, wanted in ((lora_A, x is not None), (lora_B, len(S) > 0))
    )
    return dx, dA, dB
