"""adamw: the optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor

from nf4lora import _C

_ops = torch.ops.nf4lora
MOMENT_BLOCKSIZE: int = _C.MOMENT_BLOCKSIZE


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
def _(*_):
    return None
