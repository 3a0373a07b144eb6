"""The loss of a language model, computed without holding all logits at once.

`chunk_loss` installs it in a model, so that `model(input_ids, labels=labels)` uses it; `score` returns it by token.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nf4lora.compat.torch import buffers_of
from nf4lora.loss import trl_head
from nf4lora.loss.cross_entropy import CrossEntropy
from nf4lora.loss.deferred_logits import as_matrix, deferred, is_deferrable
from nf4lora.nn.model_tree import evaluating, output_head, unchanged_random_state


def score(base: nn.Module, inputs: dict[str, Any], positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log p of each trained token of a batch, and whether it is the likeliest: [tokens] float32, [tokens] bool.

    Args:
        base: a model for which `has_plain_head` holds
        inputs: input_ids; labels [B, T] with -100 where a token is not trained; other arguments of the model
        positions: [tokens] int64, b * T + t for each trained label [b, t + 1]; None: they are read from the labels, for
            which a GPU has to be waited for
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
    if positions is None:
        positions = functional.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero()[:, 0]
    head: Any = output_head(base)
    # index_select, since a mask as an index waits for a GPU, in the forward and in the backward pass.
    rows = hidden.flatten(0, 1).index_select(0, positions)
    return CrossEntropy.apply(rows, head.weight, head.bias, labels.flatten().index_select(0, positions + 1))


def has_plain_head(base: nn.Module, device: torch.device) -> bool:
    """Whether the logits are one frozen linear layer on the last hidden states: no scale, no cap, nothing trained.

    The function runs the model and compares, because every architecture has its own name for what it does to logits.
    The mode of each module, the random state and the buffers are the same afterwards.
    """
    head = linear_head(base)
    if head is None or not head.weight.is_floating_point() or head.weight.requires_grad:
        return False
    backbone: Any = getattr(base, "base_model", base)
    if backbone is base:
        return False
    ids = torch.arange(1, 9, device=device)[None].clamp(max=head.out_features - 1)
    try:
        with (
            torch.no_grad(),
            evaluating(base),
            unchanged_buffers(base),
            unchanged_random_state([device] if device.type == "cuda" else []),
        ):
            logits = base(input_ids=ids, use_cache=False).logits
            plain = head(backbone(input_ids=ids, use_cache=False).last_hidden_state)
    except Exception:  # a model with other inputs or outputs fails in its own way, and has its own loss
        return False
    return logits.shape == plain.shape and bool((logits - plain).abs().max() <= 1e-3 * logits.std())


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    before = [(module, dict(buffers_of(module))) for module in model.modules() if buffers_of(module)]
    values = {id(b): (b, b.clone()) for _, buffers in before for b in buffers.values() if b is not None}
    try:
        yield
    finally:
        for module, buffers in before:
            buffers_of(module).clear()
            buffers_of(module).update(buffers)
        for buffer, value in values.values():
            buffer.data.copy_(value)


def chunk_loss(base: nn.Module) -> bool:
    """Make `base(input_ids, labels=labels)` compute its loss in chunks; returns whether the model was changed.

    The model's own forward still runs, with its own loss function and outputs. Where its head is a frozen linear layer
    at the time of a call, the head returns logits that are computed only when they are read, and the loss computes them
    a chunk at a time (deferred_logits.py). A compiled model stays as it is. In a call without labels the head only
    multiplies the hidden states as one matrix. The change is an attribute `forward` of this one model, as TRL's fused
    head is, which wraps it; on a CPU, where TRL's head would hold many logits, trl_head.py computes the same numbers.
    """
    if "forward" in vars(base) or linear_head(base) is None:  # accelerate's hooks, or this function's own
        return False
    base.forward = InChunks(base)
    base.register_forward_pre_hook(trl_head.take_over, with_kwargs=True)
    return True


def has_chunked_loss(base: nn.Module) -> bool:
    """Whether a call with labels computes its loss in chunks: `chunk_loss` was called, and the head is frozen."""
    return getattr(vars(base).get("forward"), "in_chunks", False) and is_deferrable(linear_head(base))


def linear_head(base: nn.Module) -> nn.Linear | None:
    """The output head, if it is a linear layer."""
    head = output_head(base)
    return head if isinstance(head, nn.Linear) else None


class InChunks:
    """A model's forward, with deferred logits where the head allows it.

    A bound method would not do: a pickled model would come back with the forward of its class instead.
    """

    in_chunks = True

    def __init__(self, base: nn.Module) -> None:
        functools.update_wrapper(self, type(base).forward)
        self.base, self.__wrapped__ = base, types.MethodType(type(base).forward, base)  # for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        base, original = self.base, type(self.base).forward
        if kwargs.pop(trl_head.TAKEN_OVER, False):
            return trl_head.score(base, *args, **kwargs)
        head = None if torch.compiler.is_compiling() else linear_head(base)
        if head is None or not is_deferrable(head):
            return original(base, *args, **kwargs)
        with as_matrix(head) if kwargs.get("labels") is None else deferred(head):
            return original(base, *args, **kwargs)

    def __reduce__(self) -> tuple[type[InChunks], tuple[nn.Module]]:
        return InChunks, (self.base,)
