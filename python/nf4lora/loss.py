"""Cross-entropy of the labelled tokens from hidden states: no logits of other tokens, never all logits at once.

`chunk_loss` puts it behind a model's own `model(input_ids, labels=labels)`. TRL has the same idea with Triton kernels;
without Triton it scores every token and multiplies in float32, which on a CPU costs a fifth of a training step.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

CHUNK = 1 << 23  # logits at a time: 32 MB of float32, which a last cache level may hold


class CrossEntropy(torch.autograd.Function):
    """log p(target), and whether no token is likelier; the gradient is made in the forward pass, where one is wanted.

    `d log p(target) / d hidden = W[target] - sum over v of p(v) W[v]`
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden: [M, H]; weight: [V, H], frozen; bias: [V] or None; targets: [M] int64 -> [M] float32, [M] bool."""
        rows = max(CHUNK // len(weight), 16)
        weight = weight.to(hidden.dtype)
        log_p = hidden.new_empty(len(targets), dtype=torch.float32)
        correct = torch.empty_like(targets, dtype=torch.bool)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits, target = hidden[part] @ weight.T, targets[part, None]
            if bias is not None:
                logits = logits.float() + bias
            largest, of_target = logits.amax(1, keepdim=True).float(), logits.gather(1, target).float()
            correct[part] = (of_target == largest)[:, 0]
            p = logits.float()  # softmax with dtype= makes two copies, and takes twice the time
            torch.softmax(p, 1, out=p)
            # The likeliest token's p is 1 / sum(exp(logit - largest)): its logarithm completes that of the target.
            log_p[part] = (of_target - largest + p.amax(1, keepdim=True).log())[:, 0]
            if grad is not None:
                p.scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
                grad[part] = -(p.to(hidden.dtype) @ weight)
        if grad is not None:
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
    return score_hidden(base, hidden, targets)


def score_hidden(base: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same from last hidden states [B, T, H] and the tokens they predict [B, T], -100 where none is asked for."""
    asked = targets != -100
    head = base.get_output_embeddings()  # type: ignore[operator]
    return CrossEntropy.apply(hidden[asked], head.weight, head.bias, targets[asked])


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


# ---- behind a model's own forward ------------------------------------------------------------------------------------


@dataclass
class LossOutput(ModelOutput):
    """What a causal model returns, its `logits` computed when they are first asked for.

    While it trains they are no item of the output (a trainer that walks over the items would ask for them); while it
    is evaluated they are.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name != "logits" or value is not None:
            return value
        make = super().__getattribute__("__dict__").get("make_logits")
        if make is not None:
            value = self.__dict__["logits"] = make()
        return value

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        return self.logits if key == "logits" else OrderedDict.__getitem__(self, key)

    def keys(self) -> Any:
        names = list(super().keys())
        return [names[0], "logits", *names[1:]] if self.__dict__.get("lists_logits") else names

    def items(self) -> Any:
        return [(name, self[name]) for name in self.keys()]

    def values(self) -> Any:
        return [self[name] for name in self.keys()]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def to_tuple(self) -> tuple:
        return tuple(self.values())


def chunk_loss(base: nn.Module) -> bool:
    """Let `base(input_ids, labels=labels)` compute its loss in chunks; says whether that was changed.

    Only where the model allows it: a frozen plain head, transformers' own loss for causal models, all of it on one
    device. The logits of such a call are computed only if they are looked at; calls without labels, those that ask for
    another loss or a part of the logits, and compiled models stay as they are. On transformers' side this is an
    instance's `forward`, as TRL's fused head is, which wraps it.
    """
    devices = {parameter.device for parameter in base.parameters()}
    replaceable = (
        "forward" not in vars(base)  # accelerate's hooks, or ourselves
        and getattr(base, "loss_type", None) == "ForCausalLM"
        and len(devices) == 1
        and next(iter(devices)).type != "meta"
        and hasattr(base, "get_output_embeddings")
    )
    if not replaceable or not has_plain_head(base, next(iter(devices))):
        return False
    base.forward = types.MethodType(_chunked(type(base).forward), base)
    return True


def _chunked(original: Callable) -> Callable:
    """The forward of a class of models with the loss in chunks where that gives the same loss."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or not _asks_for_plain_loss(self, kwargs):
            return original(self, *args, **kwargs)
        labels, shifted = kwargs.pop("labels"), kwargs.pop("shift_labels", None)
        count = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("logits_to_keep", None)
        outputs = self.base_model(**kwargs)
        hidden = outputs.last_hidden_state
        targets = F.pad(labels, (0, 1), value=-100)[..., 1:] if shifted is None else shifted
        log_p, _ = score_hidden(self, hidden, targets.to(hidden.device))
        # The mean over no token at all is NaN, as it is for torch.
        loss = -log_p.sum() / (len(log_p) if count is None else torch.as_tensor(count, device=log_p.device))
        result = LossOutput(loss=loss)
        for name, value in outputs.items():  # the cache, hidden states, attentions, as the backbone calls them
            if name != "last_hidden_state":
                result[name] = value
        result.__dict__.update(make_logits=lambda: self.get_output_embeddings()(hidden), lists_logits=not self.training)
        return result

    return forward


def _asks_for_plain_loss(model: Any, kwargs: dict[str, Any]) -> bool:
    head = model.get_output_embeddings()
    return (
        kwargs.get("labels") is not None
        and isinstance(head, nn.Linear)  # nobody has wrapped it since, with an adapter say
        and not kwargs.get("logits_to_keep")
        and kwargs.get("return_dict") is not False
        and not {"ignore_index", "reduction", "label_smoothing", "weight"} & kwargs.keys()
        and not (kwargs.get("output_router_logits") or getattr(model.config, "output_router_logits", False))
        and getattr(model, "_loss_function", None) is None  # somebody set another
        and not head.weight.requires_grad
        and type(head.weight.data) is Tensor  # not sharded
        and not torch.compiler.is_compiling()
    )
