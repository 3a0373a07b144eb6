"""Cross-entropy of the trained tokens, from hidden states: no logits of untrained tokens, never all logits at once.

TRL has the same idea with Triton kernels; without Triton it scores every token and multiplies in float32, which on a
CPU costs a fifth of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1 << 25  # logits at a time


class CrossEntropy(torch.autograd.Function):
    """log p(target), and whether the target is the likeliest token; the gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden: [M, H]; weight: [V, H], frozen; bias: [V] or None; targets: [M] int64 -> [M] float32, [M] bool."""
        rows = max(CHUNK // len(weight), 16)
        weight = weight.to(hidden.dtype)
        log_p = hidden.new_empty(len(targets), dtype=torch.float32)
        correct = torch.empty_like(targets, dtype=torch.bool)
        grad = torch.empty_like(hidden)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits, target = (hidden[part] @ weight.T).float(), targets[part, None]
            if bias is not None:
                logits += bias
            correct[part] = logits.argmax(1) == target[:, 0]
            normaliser = logits.logsumexp(1, keepdim=True)
            log_p[part] = (logits.gather(1, target) - normaliser)[:, 0]
            p = logits.sub_(normaliser).exp_()
            p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
            grad[part] = -(p.to(hidden.dtype) @ weight)  # d log p / d hidden = W[target] - sum_v p_v W[v]
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return log_p, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grads[0][:, None] * grad).to(grad.dtype), None, None, None


def score(base: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """log p of each trained token of a batch, and whether it is the likeliest: [tokens] float32, [tokens] bool.

    Args:
        base: a model for which `has_plain_head` holds
        inputs: input_ids, labels [B, T] with -100 where a token is not trained, and what else the model takes
    """
    inputs = dict(inputs)
    targets = inputs.pop("labels")[:, 1:]
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]  # type: ignore[operator]
    trained = targets != -100
    head = base.get_output_embeddings()  # type: ignore[operator]
    return CrossEntropy.apply(hidden[trained], head.weight, head.bias, targets[trained])


def has_plain_head(base: nn.Module, device: torch.device) -> bool:
    """Whether the logits are one frozen linear layer on the last hidden states: no scale, no cap, nothing trained.

    It is tried, not looked up: every architecture has its own name for what it does to logits.
    """
    head = base.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or head.weight.requires_grad:
        return False
    backbone: Any = getattr(base, "base_model", base)
    if backbone is base:
        return False
    mode, ids = base.training, torch.arange(1, 9, device=device)[None]
    base.eval()
    try:
        with torch.no_grad():
            logits = base(input_ids=ids, use_cache=False).logits
            plain = head(backbone(input_ids=ids, use_cache=False).last_hidden_state)
    except (TypeError, AttributeError):  # a model with other inputs or outputs
        return False
    finally:
        base.train(mode)
    return logits.shape == plain.shape and bool((logits - plain).abs().max() <= 1e-3 * logits.std())
