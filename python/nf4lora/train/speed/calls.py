"""A call of a block as a list of tensors, and as what there is beside their values: its form. A call with the form and
the kinds of tensors of a captured one can be replayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, str, type(None), torch.dtype)  # arguments that a graph may hold as they are


Memory = tuple[int, torch.Size, tuple[int, ...], torch.dtype]
Kind = tuple[torch.Size, torch.dtype, torch.device, bool]


@dataclass
class Call:
    """What a block was called with, and what it returned.

    Its tensors are known by their memory, which it keeps. It keeps nothing of autograd: nodes of a graph remember the
    stream that they were made on, which no capture may wait for.

    Attributes:
        form: all that there is in the arguments beside the values of tensors: see `take_apart`
        tensors: those arguments that are tensors
        kinds: of these tensors, as they were
        outputs: the tensors that it returned
        autocast: whether autocast was on, and its dtype
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    form: list[Any]
    tensors: list[Tensor]
    kinds: list[Kind]
    outputs: list[Tensor]
    autocast: tuple[bool, torch.dtype]

    @classmethod
    def noted(cls, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> Call:
        form: list[Any] = []
        given: list[Tensor] = []
        take_apart((args, kwargs), form, given)
        tensors = [tensor.detach() for tensor in given]
        args, kwargs = put_together(form, iter(tensors))
        kinds = [kind_of(tensor) for tensor in given]
        autocast = autocast_of(outputs[0].device.type)
        return cls(args, kwargs, form, tensors, kinds, [output.detach() for output in outputs], autocast)

    @property
    def strange(self) -> list[Any]:
        """Arguments that a graph cannot hold."""
        return [value for value in self.form if not isinstance(value, (*PLAIN, Container))]


class Container(tuple):
    """Stands in a form for a tuple, list or dict: its type, and its length or its keys."""


TENSOR = Container(("tensor",))


def take_apart(value: Any, form: list[Any], tensors: list[Tensor]) -> None:
    """Add the tensors in a value to a list, and to another one all that there is beside their values."""
    if isinstance(value, Tensor):
        form.append(TENSOR)
        tensors.append(value)
    elif isinstance(value, dict):
        form.append(Container((dict, *value)))
        for item in value.values():
            take_apart(item, form, tensors)
    elif isinstance(value, (tuple, list)):
        form.append(Container((type(value), len(value))))
        for item in value:
            take_apart(item, form, tensors)
    else:
        form.append(value)


def put_together(form: list[Any], tensors: Iterator[Tensor]) -> Any:
    """The value that was taken apart, with other tensors."""
    parts = iter(form)

    def next_value() -> Any:
        part = next(parts)
        if part is TENSOR:
            return next(tensors)
        if not isinstance(part, Container):
            return part
        kind, *rest = part
        if kind is dict:
            return {key: next_value() for key in rest}
        return kind([next_value() for _ in range(rest[0])])

    return next_value()


def replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same value with other tensors."""
    form: list[Any] = []
    take_apart(value, form, [])
    return put_together(form, tensors)


def kind_of(tensor: Tensor) -> Kind:
    """What a graph takes for granted of a tensor that it reads."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def memory_of(tensor: Tensor) -> Memory:
    """Equal for tensors that have the same values in the same place."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def autocast_of(kind: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
