"""The ops as Python sees them: docstring, fake and gradient of each, concept by concept.

The schemas are in csrc/ops.cpp, the checks and every error text in csrc/check.h, the meaning in reference.py. Letters:
M tokens, N out features, K in features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from nf4lora import _C

_ops = torch.ops.nf4lora

BLOCKSIZE: int = _C.BLOCKSIZE
BLOCKSIZES: tuple[int, ...] = _C.BLOCKSIZES
NESTED_BLOCKSIZE: int = _C.NESTED_BLOCKSIZE
MOMENT_BLOCKSIZE: int = _C.MOMENT_BLOCKSIZE


# ---- nf4: the weight ------------------------------------------------------------------------------------------------


def nf4_quantize(weight: Tensor, blocksize: int = BLOCKSIZE) -> tuple[Tensor, Tensor]:
    """Pack a weight to 4 bits per value.

    `absmax` is the largest magnitude of a block of `blocksize` neighbours in a row, and each value becomes the index
    of the nearest NF4 code to `value / absmax`, a tie taking the lower one. Bytes and absmax are those of
    bitsandbytes. Not differentiable: gradients do not flow through it.

    Args:
        weight: [..., K] float32, bfloat16 or float16, finite; K a multiple of blocksize
        blocksize: a power of two between 32 and 4096

    Returns:
        qweight: [..., K/2] uint8, two codes a byte, the lower k in the high nibble
        absmax: [..., K/blocksize] float32

    Raises:
        ValueError: an illegal blocksize; K no multiple of it; NaN or Inf in weight.
        TypeError: a dtype that is none of the three.

    Source: QLoRA (arXiv:2305.14314), section 3 and appendix E.

    >>> qweight, absmax = nf4_quantize(torch.linspace(-2, 2, 64))
    >>> qweight.shape, absmax
    (torch.Size([32]), tensor([2.]))
    """
    return _ops.nf4_quantize(weight.detach(), blocksize)


@torch.library.register_fake("nf4lora::nf4_quantize")
def _(weight, blocksize):
    *lead, K = weight.shape
    return weight.new_empty([*lead, K // 2], dtype=torch.uint8), weight.new_empty(
        [*lead, K // blocksize], dtype=torch.float32
    )


def nf4_dequantize(
    qweight: Tensor,
    absmax: Tensor,
    blocksize: int = BLOCKSIZE,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Unpack a weight: `round_to_dtype(code[q] * absmax)`, one float32 multiply and one rounding.

    This is the weight that every other op computes with, on every device.

    Args:
        qweight: [..., K/2] uint8
        absmax: [..., K/blocksize] float32 (see absmax_dequantize for the double-quantised)
        dtype: float32, bfloat16 or float16; ignored where `out` is given
        out: [..., K] contiguous, of one of those dtypes, written instead of a new tensor

    Returns:
        weight: [..., K]

    Raises:
        ValueError: shapes that do not belong together; an illegal blocksize; another device.
        TypeError: a dtype that is not as above.

    >>> qweight, absmax = nf4_quantize(torch.tensor([2.0, -2.0] * 32))
    >>> nf4_dequantize(qweight, absmax)[:2]
    tensor([ 2., -2.], dtype=torch.bfloat16)
    """
    if out is None:
        return _ops.nf4_dequantize(qweight, absmax, blocksize, dtype)
    _ops.nf4_dequantize.out(qweight, absmax, blocksize, out=out)
    return out


@torch.library.register_fake("nf4lora::nf4_dequantize")
def _(qweight, absmax, blocksize, dtype):
    *lead, half = qweight.shape
    return qweight.new_empty([*lead, half * 2], dtype=dtype)


@torch.library.register_fake("nf4lora::nf4_dequantize.out")
def _(qweight, absmax, blocksize, *, out):
    return None


# ---- absmax: its scales ---------------------------------------------------------------------------------------------


def absmax_quantize(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the scales again, to 8 bits each (double quantisation).

    The mean is subtracted (summed in float64, stored as the offset); then each block of 256 is scaled by its largest
    magnitude and takes the nearest value of the signed dynamic 8-bit map, a tie the lower one.

    Args:
        absmax: any shape, float32, finite, and so are their distances from the mean

    Returns:
        absmax_q: the same shape, uint8
        nested: [ceil(n/256) + 1] float32, one scale per 256 values, the offset last

    Raises:
        ValueError: NaN or Inf in absmax, or values of both signs further than 3.4e38 from the mean.
        TypeError: absmax is not float32.

    Source: QLoRA (arXiv:2305.14314), section 3; the map: arXiv:2110.02861, section 1.3.

    >>> absmax_q, nested = absmax_quantize(torch.tensor([1.0, 2.0, 3.0]))
    >>> absmax_q, nested
    (tensor([  0, 127, 255], dtype=torch.uint8), tensor([1., 2.]))
    """
    return _ops.absmax_quantize(absmax.detach())


@torch.library.register_fake("nf4lora::absmax_quantize")
def _(absmax):
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(
        [(absmax.numel() + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE + 1], dtype=torch.float32
    )


def absmax_dequantize(absmax_q: Tensor, nested: Tensor) -> Tensor:
    """Decode double-quantised scales: `RN(RN(map[q] * nested) + offset)`, two roundings.

    Args:
        absmax_q: any shape, uint8
        nested: [ceil(n/256) + 1] float32, the offset last

    Returns:
        absmax: the shape of absmax_q, float32

    Raises:
        ValueError: nested is not as long as absmax_q asks for.
        TypeError: another dtype.

    >>> absmax_dequantize(*absmax_quantize(torch.tensor([2.0, 2.0, 3.5])))
    tensor([1.9992, 1.9992, 3.5000])
    """
    return _ops.absmax_dequantize(absmax_q, nested)


@torch.library.register_fake("nf4lora::absmax_dequantize")
def _(absmax_q, nested):
    return absmax_q.new_empty(absmax_q.shape, dtype=torch.float32)


# ---- lora: the linear layer -----------------------------------------------------------------------------------------


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
        ValueError: shapes that do not belong together; two devices; dropout outside [0, 1) or without a seed.
        TypeError: a dtype that is not as above.
        NotImplementedError: forward-mode differentiation, or a transform of torch.func.

    Source: LoRA (arXiv:2106.09685); Philox: Salmon et al., SC'11.

    >>> qweight, absmax = nf4_quantize(torch.eye(64)[:3])
    >>> lora_linear(torch.arange(64.0), qweight, absmax)
    tensor([0., 1., 2.])
    """
    if bias is not None and bias.requires_grad:
        bias = bias.detach()
    arguments = (x, qweight, absmax, nested, bias, lora_A, lora_B, scaling, dropout, seed, blocksize)
    if torch.compiler.is_compiling():
        return _ops.lora_linear.default(*arguments)[0]
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        _refuse_transforms(x, bias, lora_A, lora_B)
    if _wants_gradient(x, lora_A, lora_B):
        return _LoraLinear.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # the way through Python that notes a gradient costs 10 microseconds
        return _ops.lora_linear.default(*arguments)[0]


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """Both ways below go past what torch.func and forward mode have to see, and would drop their part of the result."""
    duals = (tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    if torch._C._are_functorch_transforms_active() or any(duals):
        raise NotImplementedError(
            "lora_linear: gradients must be taken by reverse mode (backward, torch.autograd.grad), got forward-mode "
            "differentiation or a transform of torch.func (vmap, grad, jvp); call backward() per sample instead, or "
            "dequantise the layer with model.dequantize()"
        )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@torch.library.register_fake("nf4lora::lora_linear")
def _(x, qweight, absmax, nested, bias, lora_A, lora_B, scaling, dropout, seed, blocksize):
    *lead, _ = x.shape
    tokens = 1
    for size in lead:
        tokens = tokens * size
    rank = 0 if lora_A is None else lora_A.shape[0]
    return x.new_empty([*lead, qweight.shape[0]]), x.new_empty([tokens, rank])


@torch.library.register_fake("nf4lora::lora_linear_backward")
def _(dy, x, S, qweight, absmax, nested, lora_A, lora_B, scaling, dropout, seed, blocksize, need_dx):
    shape = [*dy.shape[:-1], 2 * qweight.shape[1]] if x is None else x.shape
    dx, none = dy.new_empty(shape if need_dx else [0]), dy.new_empty([0], dtype=torch.float32)
    dA = none if lora_A is None or x is None else lora_A.new_empty(lora_A.shape)
    return dx, dA, none.clone() if lora_B is None or S is None else lora_B.new_empty(lora_B.shape)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output[1])


def _save(ctx, inputs, S):
    x, qweight, absmax, nested, _, lora_A, lora_B, ctx.scaling, ctx.dropout, seed, ctx.blocksize = inputs
    # x matters to dA alone and S to dB: a layer whose adapter is frozen, or that has none, keeps neither alive. The
    # rest is there anyway, and is saved as it is, not copied.
    x = x if ctx.needs_input_grad[5] else None
    S = S if ctx.needs_input_grad[6] else None
    ctx.save_for_backward(x, S, qweight, absmax, nested, lora_A, lora_B, seed)


def _backward(ctx, dy, _=None):
    x, S, qweight, absmax, nested, lora_A, lora_B, seed = ctx.saved_tensors
    need_dx, need_dA, need_dB = (ctx.needs_input_grad[i] for i in (0, 5, 6))
    dx, dA, dB = _ops.lora_linear_backward.default(
        dy, x, S, qweight, absmax, nested, lora_A, lora_B, ctx.scaling, ctx.dropout, seed, ctx.blocksize, need_dx
    )
    dx, dA, dB = (grad if needed else None for grad, needed in ((dx, need_dx), (dA, need_dA), (dB, need_dB)))
    return dx, None, None, None, None, dA, dB, None, None, None, None


class _LoraLinear(torch.autograd.Function):
    """The same gradient for eager code: the registered one takes 50 microseconds more, a small layer's own time."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            y, S = _ops.lora_linear.default(*inputs)
        _save(ctx, inputs, S)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _backward(ctx, dy)


torch.library.register_autograd("nf4lora::lora_linear", _backward, setup_context=_setup_context)

# ---- adamw: the optimizer step --------------------------------------------------------------------------------------


def adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    absmaxs: list[Tensor],
    skipped: Tensor,
    scale: Tensor | None = None,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    step: int = 1,
) -> None:
    """Take one step of AdamW on every tensor of the lists, in place and in one pass.

    With g = grad * scale, in float32 and rounded where torch.optim.AdamW's single-tensor path rounds:

        exp_avg    = exp_avg + (1 - beta1) (g - exp_avg)
        exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
        update     = exp_avg / (1 - beta1^step) / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
        param      = (1 - lr weight_decay) param - lr update

    A value whose gradient is not finite stays as it is, with its moments. Moments of 8 bits share an absmax per 256
    values; the step is taken with the new moments before they are rounded to the nearest value of their map. An
    exp_avg_sq that is not zero is never stored as zero. Where the gradient has ended (its magnitude is below
    min(1/2, 4 (1 - beta1)) of exp_avg's), exp_avg shrinks enough for its code to change, so that it reaches zero.

    Args:
        params: [...] float32, bfloat16 or float16, contiguous
        grads: shape and dtype of params
        exp_avgs: the first moments, float32 or uint8 (signed dynamic map), shapes of params
        exp_avg_sqs: the second moments, float32 or uint8 (unsigned dynamic map)
        absmaxs: [ceil(n/256), 2] float32, of exp_avg and exp_avg_sq; an empty list for float32 moments
        skipped: [1] int64, to which the number of gradients that were not finite is added
        scale: [1] float32, multiplies every gradient (clipping by norm, loss scaling)
        step: counts from 1

    Raises:
        ValueError: lists or tensors that do not belong together; a number outside its range.
        TypeError: another dtype.

    Source: Loshchilov and Hutter (arXiv:1711.05101); 8 bits: Dettmers et al. (arXiv:2110.02861).

    >>> param, exp_avg, exp_avg_sq = torch.ones(2), torch.zeros(2), torch.zeros(2)
    >>> skipped = torch.zeros(1, dtype=torch.int64)
    >>> adamw_step_([param], [torch.tensor([0.5, float("nan")])], [exp_avg], [exp_avg_sq], [], skipped, lr=0.1)
    >>> param, skipped
    (tensor([0.8990, 1.0000]), tensor([1]))
    """
    _ops.adamw_step_.default(
        params, grads, exp_avgs, exp_avg_sqs, absmaxs, skipped, scale, lr, beta1, beta2, eps, weight_decay, step
    )


@torch.library.register_fake("nf4lora::adamw_step_")
def _(params, grads, exp_avgs, exp_avg_sqs, absmaxs, skipped, scale, lr, beta1, beta2, eps, weight_decay, step):
    return None


if _C.CUDA_VERSION:  # csrc/cuda/absent.cpp answers in a build without CUDA
    from nf4lora import cuda

    torch.library.register_kernel("nf4lora::lora_linear", "cuda", cuda.lora_linear)
    torch.library.register_kernel("nf4lora::lora_linear_backward", "cuda", cuda.lora_linear_backward)
