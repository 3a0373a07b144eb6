"""What code outside of NF4Linear sees as its `weight`: the packed codes, which raise an error in arithmetic.

A packed code is an index, not the value of a weight. A model that multiplies by `layer.weight`, or a PEFT method that
adds a delta to it, would compute garbage from the codes or overwrite them, mostly without an error. So
`NF4Linear.weight` returns a guard around the parameter. The parameter itself, which state dicts, files, FSDP and the
layer's own forward use, is a plain one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora.compat.torch import as_subclass, storage_address, tree_leaves, tree_map_only

# In-place functions that change no code, or that replace codes by other codes.
HARMLESS_IN_PLACE = ("copy_", "requires_grad_", "share_memory_", "bitwise_")
# Functions that are refused for integers too: a delta that was cast to uint8 is as wrong as one in floating point.
ARITHMETIC = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "true_divide",
    "floor_divide",
    "addmm",
    "mm",
    "bmm",
    "matmul",
    "linear",
}
# Functions that read no code.
CREATES = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_")
COPIES = {"clone", "contiguous", "to", "cpu", "cuda"}  # a copy of codes is guarded too: merging begins with one


class PackedWeight(nn.Parameter):
    """Packed codes that can be inspected, copied, moved and compared, but not combined with floating-point values.

    The guard has no memory of its own: torch functions are called with the parameter instead, unless they are refused.
    As any tensor does, the guard keeps its codes alive, even if the layer gets other ones.

    Raises:
        ValueError: in arithmetic, and in any function that also takes, or would return, floating-point values.

    >>> codes = nn.Parameter(torch.zeros(4, 32, dtype=torch.uint8), requires_grad=False)
    >>> weight = PackedWeight(codes)
    >>> weight.shape, weight.dtype, weight[:2].sum()
    (torch.Size([4, 32]), torch.uint8, tensor(0))
    >>> torch.ones(2, 32) @ weight.T                                        # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: NF4Linear: weight must not be an operand of matmul, which would take its packed 4-bit codes for ...
    """

    codes: Tensor

    def __new__(cls, codes: Tensor, requires_grad: bool = False) -> PackedWeight:
        if isinstance(codes, PackedWeight):
            codes = codes.codes
        guard = as_subclass(cls, torch.empty(0, dtype=torch.uint8))
        object.__setattr__(guard, "codes", codes)
        return guard

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        memory = {storage_address(leaf.codes) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)}
        args, kwargs = tree_map_only(cls, lambda guard: guard.codes, (args, kwargs or {}))
        name = getattr(func, "__name__", str(func))
        in_place = name.endswith("_") and not name.endswith("__") and not name.startswith(HARMLESS_IN_PLACE)
        if in_place or name.strip("_") in ARITHMETIC or any(_is_float(leaf) for leaf in tree_leaves((args, kwargs))):
            raise ValueError(refusal(name))
        result = func(*args, **kwargs)
        if not name.startswith(CREATES) and any(_is_float(leaf) for leaf in tree_leaves(result)):
            raise ValueError(refusal(name))

        def guarded(tensor: Tensor) -> Tensor:  # .data, .T, a slice and a copy are packed codes as well
            is_view = storage_address(tensor) in memory
            return cls(tensor) if tensor.dtype == torch.uint8 and (is_view or name in COPIES) else tensor

        # A torch.Size stays one: tree_map would make a plain tuple of it.
        return result if isinstance(result, torch.Size) else tree_map_only(Tensor, guarded, result)

    def __getattr__(self, name: str) -> Any:  # attributes that were set on the parameter
        if name == "codes":
            raise AttributeError(name)
        return getattr(self.codes, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_float(value) or (name == "data" and value.shape != self.codes.shape):
            raise ValueError(refusal(f"an assignment to .{name}"))
        setattr(self.codes, name, value.codes if isinstance(value, PackedWeight) else value)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.codes, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.codes.__reduce_ex__(protocol)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def refusal(what: str) -> str:
    """The text of the error, a ValueError: for a TypeError in an operator Python would print a text of its own."""
    return (
        f"NF4Linear: weight must not be an operand of {what}, which would take its packed 4-bit codes for numbers; "
        f"call the layer, or layer.dequantize(dtype) for its values, or keep it in 16 bits: "
        f"NF4Config(modules_to_not_convert=[its name]). To merge an adapter, call dequantize() on the base model first"
    )
