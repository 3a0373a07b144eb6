"""Logits that are computed only when their values are read, and in chunks where a cross-entropy reads them.

`deferred(head)` lets a model's own forward run unchanged while its output head, a frozen linear layer, returns a
`DeferredLogits`: a tensor with the shape, dtype and gradient of the logits, but without memory. What the model does
with its logits before the loss (a cast to float32, a scale, a cap, slices of tokens, a reshape to one row a token) is
recorded. `F.cross_entropy` then computes the logits in chunks; any other function gets the real logits. So every model
keeps its own output class and loss function, and no list of architectures is needed.

The graph of a loss in chunks does not contain the logits, so it has no gradient for them: retain_grad, register_hook
and torch.autograd.grad on these logits raise an error. A call without labels returns ordinary logits, and a loss that
is computed from those has a gradient for them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nf4lora.compat.torch import below_subclasses, has_hooks, parameters_of, tree_map_only, without_memory
from nf4lora.loss.cross_entropy import CrossEntropy, Steps, product_dtype, through


@dataclass
class Use:
    """How the logits of one call of the head were used; shared by all tensors that derive from them."""

    loss_in_chunks: bool = False


class DeferredLogits(Tensor):
    """`steps(head(hidden))`, computed for the first function that needs the values, and then kept."""

    hidden: Tensor  # [..., H]
    head: nn.Linear
    product: torch.dtype  # of head(hidden)
    steps: Steps
    computed: Tensor | None
    use: Use

    @staticmethod
    def __new__(
        cls, hidden: Tensor, head: nn.Linear, product: torch.dtype, steps: Steps, dtype: torch.dtype
    ) -> DeferredLogits:
        shape = (*hidden.shape[:-1], head.out_features)
        logits = without_memory(cls, shape, dtype, hidden.device)
        logits.hidden, logits.head, logits.product, logits.steps, logits.computed = hidden, head, product, steps, None
        return logits

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with below_subclasses():
            if func in METADATA:
                return func(*args, **kwargs)
            handler = HANDLERS.get(func)
            if kwargs and func not in TAKE_KEYWORDS:
                handler = None
            if handler is not None and isinstance(args[0] if args else None, cls) and args[0].computed is None:
                result = handler(*args, **kwargs)
                if result is not None:
                    return result
            if func in ASK_FOR_GRADIENT:
                _refuse_gradient(func, args, kwargs)
            args, kwargs = tree_map_only(cls, compute, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached below autograd, where an autograd.Function has passed the logits on without __torch_function__.
        args, kwargs = tree_map_only(cls, lambda logits: compute(logits).detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Defer(torch.autograd.Function):
    """Puts deferred logits into autograd's graph, for functions that reach autograd without __torch_function__."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.how = how
        return DeferredLogits(hidden, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            head, product, steps, _ = ctx.how
            (result,) = torch.autograd.grad(_logits(hidden, head, product, steps), hidden, grad)
        return result, *[None] * len(ctx.how)


def defer(
    hidden: Tensor, head: nn.Linear, product: torch.dtype, steps: Steps, dtype: torch.dtype, use: Use
) -> DeferredLogits:
    logits = _Defer.apply(hidden, head, product, steps, dtype)
    logits.hidden = hidden  # the tensor with its graph: forward() of an autograd.Function gets one without
    logits.use = use
    return logits


def compute(logits: DeferredLogits) -> Tensor:
    """The values of the logits, computed at the first call, always with their gradient."""
    if logits.computed is None:
        with torch.enable_grad():
            logits.computed = _logits(logits.hidden, logits.head, logits.product, logits.steps)
    return logits.computed


def _logits(hidden: Tensor, head: nn.Linear, product: torch.dtype, steps: Steps) -> Tensor:
    """What the head would have returned when it was called, independent of the autocast that is on now."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.to(product)
        return through(steps, _product(hidden.to(product), head.weight.to(product), bias))


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of hidden states as one matrix.

    The last token of each prompt, which generating starts with, is a slice. With a frozen weight torch multiplies a
    slice by a copy of the weight for each row of the batch: 16 prompts took 0.9 GB and 150 times as long for
    SmolLM2-135M's head on a CPU.
    """
    if hidden.dim() < 3:
        return F.linear(hidden, weight, bias)
    return F.linear(hidden.flatten(0, -2), weight, bias).unflatten(0, hidden.shape[:-1])


# ---- functions that need no values ----------------------------------------------------------------------------------

_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "requires_grad",
    "grad_fn",
    "is_leaf",
    "is_cuda",
    "is_meta",
)
METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.__len__, Tensor.ndimension, Tensor.element_size, torch.is_floating_point, torch.is_complex, torch.numel),
}


@dataclass(frozen=True)
class Step:
    """One element-wise function that the model applies to its logits."""

    function: Callable
    arguments: tuple

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(logits, *self.arguments)


TO_FLOAT = Step(Tensor.to, (torch.float32,))


def _then(logits: DeferredLogits, function: Callable, *arguments: Any, dtype: torch.dtype | None = None) -> Tensor:
    steps: Steps = (*logits.steps, Step(function, arguments))
    return defer(logits.hidden, logits.head, logits.product, steps, dtype or logits.dtype, logits.use)


def _of(logits: DeferredLogits, hidden: Tensor) -> Tensor:
    """The logits of some of the tokens, whose hidden states are given."""
    return defer(hidden, logits.head, logits.product, logits.steps, logits.dtype, logits.use)


def _cast(logits: DeferredLogits, dtype: Any) -> Tensor | None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return None
    return logits if dtype == logits.dtype else _then(logits, Tensor.to, dtype, dtype=dtype)


def _to(logits: DeferredLogits, *args: Any, **kwargs: Any) -> Tensor | None:
    return _cast(logits, args[0] if args else kwargs.get("dtype")) if len(args) + len(kwargs) == 1 else None


def _scaled(function: Callable, logits: DeferredLogits, *args: Any) -> Tensor | None:
    """A function that scales or caps logits, if its other arguments are all numbers."""
    if not all(type(number) in (int, float) for number in args):
        return None
    return _then(logits, function, *args)


def _reshaped(logits: DeferredLogits, *shape: Any) -> Tensor | None:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    hidden = logits.hidden
    fits = len(shape) > 1 and shape[-1] == logits.shape[-1] and all(type(size) is int for size in shape)
    tokens = math.prod(hidden.shape[:-1])
    if not fits or (-1 not in shape and math.prod(shape[:-1]) != tokens) or (-1 in shape and len(shape) > 2):
        return None
    return _of(logits, hidden.reshape(tokens if shape[0] == -1 else shape[0], *shape[1:-1], hidden.shape[-1]))


def _indexed(logits: DeferredLogits, index: Any) -> Tensor | None:
    """Select tokens by an index, if it does not select from the vocabulary."""
    if type(index) is Tensor and index.dtype == torch.bool and index.dim() < logits.dim():
        return _of(logits, logits.hidden[index])
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is ... or type(part) in (int, slice) for part in parts) or parts.count(...) > 1:
        return None
    last = parts[parts.index(...) + 1 :] if ... in parts else parts if len(parts) == logits.dim() else ()
    if (last and last[-1] != slice(None)) or len(parts) > logits.dim() + (... in parts):
        return None
    if ... in parts and not last and len(parts) > logits.dim():
        return None  # the ellipsis covers no dimension, so an index before it selects from the vocabulary
    return _of(logits, logits.hidden[index])


def _cross_entropy(
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """F.cross_entropy in chunks, for logits with one row a token; None for any other call."""
    ordinary = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    one_target_a_row = logits.dim() == 2 and target.dim() == 1 and len(target) == len(logits)
    known = reduction in ("mean", "sum", "none") and target.dtype == torch.int64 and target.device == logits.device
    if not (ordinary and one_target_a_row and known) or isinstance(target, DeferredLogits):
        return None
    asked = (target != ignore_index).nonzero()[:, 0]  # here a GPU is waited for, once
    head, chosen = logits.head, target.index_select(0, asked)
    if chosen.device.type == "cpu" and len(chosen) and not 0 <= chosen.min() <= chosen.max() < logits.shape[-1]:
        return None  # torch raises an error that names the index
    # The loss is computed in float32 whatever the logits are: a cast to it changes nothing.
    steps = () if set(logits.steps) <= {TO_FLOAT} else logits.steps
    logits.use.loss_in_chunks = True
    log_p, _ = CrossEntropy.apply(
        logits.hidden.index_select(0, asked), head.weight, head.bias, chosen, steps, logits.product
    )
    if reduction == "none":
        losses = log_p.new_zeros(len(target)).index_copy(0, asked, -log_p)
    else:
        # The mean over no token at all is NaN, as it is for torch.
        losses = -log_p.sum() / (len(log_p) if reduction == "mean" else 1)
    return losses.to(logits.dtype)


SCALES = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.div, Tensor.__truediv__, torch.div)
HANDLERS: dict[Callable, Callable[..., Tensor | None]] = {
    Tensor.float: lambda logits: _cast(logits, torch.float32),
    Tensor.half: lambda logits: _cast(logits, torch.float16),
    Tensor.bfloat16: lambda logits: _cast(logits, torch.bfloat16),
    Tensor.to: _to,
    **{function: functools.partial(_scaled, function) for function in (*SCALES, Tensor.tanh, torch.tanh)},
    Tensor.view: _reshaped,
    Tensor.reshape: _reshaped,
    torch.reshape: _reshaped,
    Tensor.contiguous: lambda logits: logits,
    Tensor.detach: lambda logits: _of(logits, logits.hidden.detach()),
    Tensor.__getitem__: _indexed,
    F.cross_entropy: _cross_entropy,
}
TAKE_KEYWORDS = {Tensor.to, F.cross_entropy}  # other handlers take no keywords: such a call gets the computed logits
ASK_FOR_GRADIENT = {Tensor.retain_grad, Tensor.register_hook, torch.autograd.grad}


def _refuse_gradient(func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise where a caller asks for the gradient of logits whose loss was computed in chunks: there is none.

    Hooks of torch itself, such as FSDP's, are allowed.
    """
    if func is torch.autograd.grad:
        asked = kwargs["inputs"] if "inputs" in kwargs else args[1]
        asked = asked if isinstance(asked, (tuple, list)) else [asked]
    else:
        asked = args[:1]
    hook = args[1] if func is Tensor.register_hook and len(args) > 1 else kwargs.get("hook")
    of_torch = str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.")
    if not of_torch and any(isinstance(tensor, DeferredLogits) and tensor.use.loss_in_chunks for tensor in asked):
        raise RuntimeError(
            f"DeferredLogits: {func.__name__} must get logits that are in the graph of the loss, got logits of a call "
            f"that computed a loss in chunks, without them; call the model without labels, and compute the loss from "
            f"its logits"
        )


# ---- the head --------------------------------------------------------------------------------------------------------


def is_deferrable(head: Any) -> bool:
    """Whether this is a frozen linear layer, not sharded, whose call does nothing but multiply."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return False
    weight: Any = parameters_of(head).get("weight")  # None where a parametrization computes it
    return (
        weight is not None
        and not has_hooks(head)
        and not any(parameter.requires_grad for parameter in head.parameters())
        and weight.is_floating_point()
        and not weight.is_meta
        and type(weight.data) is Tensor  # not sharded
        and weight.shape == (head.out_features, head.in_features)
    )


def deferred(head: nn.Linear) -> contextlib.AbstractContextManager[None]:
    """The head returns deferred logits inside this context."""
    return _calling(_deferred, head)


def as_matrix(head: nn.Linear) -> contextlib.AbstractContextManager[None]:
    """The head multiplies hidden states as one matrix (`_product`) inside this context."""
    return _calling(_as_matrix, head)


@contextlib.contextmanager
def _calling(forward: Callable[[nn.Linear, Tensor], Tensor], head: nn.Linear) -> Iterator[None]:
    head.__dict__["forward"] = functools.partial(forward, head)
    try:
        yield
    finally:
        head.__dict__.pop("forward", None)


def _as_matrix(head: nn.Linear, hidden: Tensor) -> Tensor:
    return _product(hidden, head.weight, head.bias)


def _deferred(head: nn.Linear, hidden: Tensor) -> Tensor:
    product = product_dtype(hidden)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    same = hidden.device == head.weight.device and (autocast or hidden.dtype == head.weight.dtype)
    if not same or hidden.dim() < 2 or not hidden.is_floating_point() or hidden.shape[-1] != head.in_features:
        return nn.Linear.forward(head, hidden)  # raises torch's error, or has few logits
    return defer(hidden, head, product, (), product, Use())
