"""lora: the frozen 4-bit linear layer with its LoRA branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from nf4lora.compat.torch import below_autograd, is_forward_mode, is_transformed
from nf4lora.ops.arguments import LoraLinear, LoraLinearBackward
from nf4lora.ops.kernels import dispatch
from nf4lora.ops.kernels.kept_weights import keep_if_computed_again
from nf4lora.ops.nf4 import BLOCKSIZE

_ops = torch.ops.nf4lora


def lora_linear(
    x: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    nested: Tensor | None = None,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    blocksize: int = BLOCKSIZE,
) -> Tensor:
    """The frozen 4-bit linear layer and its LoRA branch in one pass over the packed weight.

    `y = x W^T + bias + scaling * S B^T`, with `S = dropout(x) A^T` and W exactly as nf4_dequantize gives it in x's
    dtype. A, B, S and, in the backward pass, T = dy B are rounded once to x's dtype; all sums are float32. Dropout
    keeps element (m, k) where the word of Philox4x32-10(seed, m * K + k) says so, on every device alike.
    Differentiable in x, lora_A and lora_B. For that it keeps x where lora_A wants a gradient, S where lora_B does, and
    the seed; the bias and the weight are frozen. First derivatives by reverse mode only.

    Args:
        x: [..., K] float32, bfloat16 or float16
        qweight: [N, K/2] uint8
        absmax: [N, K/blocksize] float32, or uint8 with nested
        nested: [ceil(N*K/blocksize/256) + 1] float32
        bias: [N]
        lora_A: [R, K], lora_B: [N, R]; together or not at all
        scaling: lora_alpha / r, applied in float32
        dropout: probability in [0, 1) of an element of x to be left out of the LoRA branch
        seed: [1] int64, needed when dropout > 0; draw it with torch.randint, so that torch.manual_seed rules it

    Returns:
        y: [..., N] of x's dtype

    Raises:
        ValueError: shapes that do not belong together; two devices; dropout outside [0, 1) or without a seed; scaling
            that is not finite.
        TypeError: a dtype that is not as above.
        NotImplementedError: forward-mode differentiation, or a transform of torch.func.

    Source: LoRA (arXiv:2106.09685); Philox: Salmon et al., SC'11.

    >>> qweight, absmax = nf4lora.ops.nf4_quantize(torch.eye(64)[:3])
    >>> lora_linear(torch.arange(64.0), qweight, absmax)
    tensor([0., 1., 2.])
    """
    if bias is not None and bias.requires_grad:
        bias = bias.detach()
    arguments = (x, qweight, absmax, nested, bias, lora_A, lora_B, scaling, dropout, seed, blocksize)
    if torch.compiler.is_compiling():
        return _ops.lora_linear.default(*arguments)[0]
    if is_transformed() or is_forward_mode():
        _refuse_transforms(x, bias, lora_A, lora_B)
    if _wants_gradient(x, lora_A, lora_B):
        return _Differentiable.apply(*arguments)
    with below_autograd():
        return called(_ops.lora_linear.default, arguments)[0]


def called(op: Any, arguments: tuple) -> Any:
    """The op's results. C++ beyond torch's stable ABI cannot raise torch.OutOfMemoryError, for which callers look in
    order to go on with smaller batches: it raises a RuntimeError with torch's words."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        if "CUDA out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """Both ways below go past what torch.func and forward mode have to see, and would drop their part of the result."""
    duals = (tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    if is_transformed() or any(duals):
        raise NotImplementedError(
            "lora_linear: gradients must be taken by reverse mode (backward, torch.autograd.grad), got forward-mode "
            "differentiation or a transform of torch.func (vmap, grad, jvp); call backward() per sample instead, or "
            "dequantise the layer with model.dequantize()"
        )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@torch.library.register_fake("nf4lora::lora_linear")
def _(*given):
    a = LoraLinear(*given)
    *lead, _ = a.x.shape
    tokens = 1
    for size in lead:
        tokens = tokens * size
    rank = 0 if a.lora_A is None else a.lora_A.shape[0]
    return a.x.new_empty([*lead, a.qweight.shape[0]]), a.x.new_empty([tokens, rank])


@torch.library.register_fake("nf4lora::lora_linear_backward")
def _(*given):
    a = LoraLinearBackward(*given)
    shape = [*a.dy.shape[:-1], 2 * a.qweight.shape[1]] if a.x is None else a.x.shape
    dx, none = a.dy.new_empty(shape if a.need_dx else [0]), a.dy.new_empty([0], dtype=torch.float32)
    dA = none if a.lora_A is None or a.x is None else a.lora_A.new_empty(a.lora_A.shape)
    return dx, dA, none.clone() if a.lora_B is None or a.S is None else a.lora_B.new_empty(a.lora_B.shape)


_PLACES = list(LoraLinear.__annotations__)
_X, _A, _B = (_PLACES.index(name) for name in ("x", "lora_A", "lora_B"))  # those that can have a gradient


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _save(ctx, LoraLinear(*inputs), output[1])


def _save(ctx, a, S):
    ctx.scaling, ctx.dropout, ctx.blocksize = a.scaling, a.dropout, a.blocksize
    # x matters to dA alone and S to dB: a layer whose adapter is frozen, or that has none, keeps neither alive. The
    # rest is there anyway, and is saved as it is, not copied.
    x = a.x if ctx.needs_input_grad[_A] else None
    S = S if ctx.needs_input_grad[_B] else None
    ctx.save_for_backward(x, S, a.qweight, a.absmax, a.nested, a.lora_A, a.lora_B, a.seed)


def _backward(ctx, dy, _=None):
    saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
    arguments = LoraLinearBackward(  # type: ignore[misc]  # of *saved, mypy does not know how many there are
        dy,
        *saved[:-1],
        scaling=ctx.scaling,
        dropout=ctx.dropout,
        seed=saved[-1],
        blocksize=ctx.blocksize,
        need_dx=wanted[_X],
    )
    dx, dA, dB = called(_ops.lora_linear_backward.default, arguments)
    gradients = [None] * len(_PLACES)
    for place, gradient in ((_X, dx), (_A, dA), (_B, dB)):
        if wanted[place]:
            gradients[place] = gradient
    return tuple(gradients)


class _Differentiable(torch.autograd.Function):
    """The same gradient for eager code: the registered one takes 50 microseconds more, a small layer's own time."""

    @staticmethod
    def forward(ctx, *inputs):
        if inputs[_X].is_cuda:
            keep_if_computed_again(inputs[_X])
        with below_autograd():
            y, S = called(_ops.lora_linear.default, inputs)
        _save(ctx, LoraLinear(*inputs), S)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _backward(ctx, dy)


torch.library.register_autograd("nf4lora::lora_linear", _backward, setup_context=_setup_context)
dispatch.hand_over(dispatch.rules())
