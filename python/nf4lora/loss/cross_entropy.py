"""Cross-entropy of selected tokens from their hidden states, without logits of other tokens or all logits at once.

TRL has the same idea in Triton kernels. Without Triton it scores every token and multiplies in float32, which on a CPU
costs a fifth of a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nf4lora.loss.processor import times, times_transposed

CHUNK = 1 << 23  # logits at a time: 32 MB of float32, which may fit into the last cache level

Steps = tuple[Callable[[Tensor], Tensor], ...]  # element-wise functions that the model applies to its logits


class CrossEntropy(torch.autograd.Function):
    """log p(target), and whether no token is likelier. The forward pass computes the gradient too, where it is needed.

    `d log p(target) / d hidden = W[target] - sum over v of p(v) W[v]`; autograd differentiates `steps`, chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        steps: Steps = (),
        dtype: torch.dtype | None = None,
        entropy: bool = False,
    ) -> tuple[Tensor, ...]:
        """
        Args:
            hidden: [M, H];  weight: [V, H], frozen;  bias: [V] or None;  targets: [M] int64
            dtype: of the product hidden W^T; None: that of autocast where it is on, else hidden's
            entropy: whether to return the entropy too

        Returns:
            log p [M] float32; whether no token is likelier [M] bool; entropy of p [M] float32, without a gradient
        """
        kind = hidden.device.type
        dtype = dtype or product_dtype(hidden)
        rows = max(CHUNK // len(weight), 16)
        log_p = hidden.new_empty(len(targets), dtype=torch.float32)
        correct = torch.empty_like(targets, dtype=torch.bool)
        entropies = log_p.new_empty(len(targets) if entropy else 0)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(kind, enabled=False):
            weight = weight.to(dtype)
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                raw, target = times_transposed(hidden[part].to(dtype), weight), targets[part, None]
                if bias is not None:
                    raw = raw.float() + bias if not steps else raw + bias.to(dtype)
                logits = raw
                if steps:
                    with torch.enable_grad():
                        raw = raw.requires_grad_(grad is not None)
                        logits = through(steps, raw)
                fixed = logits.detach()
                largest, of_target = fixed.amax(1, keepdim=True).float(), fixed.gather(1, target).float()
                correct[part] = (of_target == largest)[:, 0]
                if steps:  # autograd may need these logits: they must not be overwritten
                    p = torch.softmax(fixed.float(), 1)
                else:
                    p = fixed.float()  # softmax with dtype= makes two copies, and takes twice the time
                    torch.softmax(p, 1, out=p)
                # log p(target) = target - largest - log Z, and the likeliest token, whose p is the largest, has 1 / Z.
                log_p[part] = (of_target - largest + p.amax(1, keepdim=True).log())[:, 0]
                if entropy:
                    entropies[part] = torch.special.entr(p).sum(1)
                if grad is not None:
                    p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
                    if steps:
                        (p,) = torch.autograd.grad(logits, raw, p.to(logits.dtype))
                    grad[part] = -times(p, weight)
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct, entropies)
        return (log_p, correct, entropies) if entropy else (log_p, correct)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return ((grads[0][:, None] * grad).to(grad.dtype), *[None] * (len(ctx.needs_input_grad) - 1))


def through(steps: Steps, logits: Tensor) -> Tensor:
    for step in steps:
        logits = step(logits)
    return logits


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies these hidden states: that of autocast where it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
