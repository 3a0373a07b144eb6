"""What is used of torch beyond its public interface, each thing in one place.

Tried with torch 2.11 to 2.14. `tests/test_compat.py` fails where one of these names has gone.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from nf4lora.compat.accelerate import HOOK

__all__ = ["tree_leaves", "tree_map_only"]

OF_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module


# ---- modules: their dictionaries, which an attribute takes half a microsecond to search


def children_of(module: nn.Module) -> dict[str, Any]:
    """The module's own modules by name, also under each of several names."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """The module's own parameters by name."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The module's own buffers by name."""
    return module._buffers


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The module's attributes by name, its parameters' and hooks' dictionaries among them; its modules left out."""
    return {name: value for name, value in vars(module).items() if name != "_modules"}


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module calls anything else besides its forward."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def forward_pre_hooks_of(module: nn.Module) -> dict[int, Any]:
    """What is called before the module, by the number of its handle."""
    return module._forward_pre_hooks


def forward_hooks_of(module: nn.Module) -> dict[int, Any]:
    """What is called after the module, by the number of its handle."""
    return module._forward_hooks


def bare_copy(module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> Any:
    """A module of the same class and attributes with these tensors; no modules, no hooks, no forward of its own."""
    new: Any = type(module).__new__(type(module))
    own = {name: value for name, value in module.__dict__.items() if name not in ("forward", HOOK)}
    hooks: dict[str, Any] = {name: OrderedDict() for name in (*OF_CALLS, "_state_dict_hooks")}
    new.__dict__.update({**own, **hooks, "_parameters": parameters, "_buffers": buffers, "_modules": {}})
    return new


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module's hooks for calls to the one in its place, in their own dictionaries: a user's handle removes one.

    Those by which torch.nn.utils makes the weight from others (weight_norm, spectral_norm, prune) stay behind: what
    they make is in the new weight, and the others are not there.
    """
    pre_hooks = old._forward_pre_hooks
    for key in [key for key, hook in pre_hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")]:
        del pre_hooks[key]
    names = (*OF_CALLS, *(f"_forward{pre}_hooks_with_kwargs" for pre in ("", "_pre")), "_forward_hooks_always_called")
    new.__dict__.update({name: old.__dict__[name] for name in (*names, "_is_full_backward_hook")})


class Unreplicated:
    """Mixin of a module that torch.nn.DataParallel must not copy: `refuse_replica` says what to do instead."""

    def refuse_replica(self) -> NoReturn:
        raise NotImplementedError

    def _replicate_for_data_parallel(self) -> NoReturn:
        self.refuse_replica()


def uncompiled(model: Any) -> Any:
    """The model under the wrapper of `torch.compile`, if it has one."""
    return getattr(model, "_orig_mod", model)


# ---- tensors


def version_of(tensor: Tensor) -> int:
    """Counts what has been written into a tensor in place."""
    return tensor._version


def storage_address(tensor: Tensor) -> int:
    """The same for tensors that share their memory, however it is moved."""
    return tensor.untyped_storage()._cdata


def as_subclass(cls: Any, tensor: Tensor) -> Any:
    """The tensor as one of this class, without a gradient."""
    return Tensor._make_subclass(cls, tensor, False)


def without_memory(cls: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of this class that has a shape and no values."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def dtensor_like(tensor: Tensor, dtensor: Any) -> Any:
    """A DTensor over this very tensor, which lies as the other one does."""
    return type(dtensor)(tensor, dtensor._spec, requires_grad=False)


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """The 2-norm of each, in float32, in one call."""
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32))


# ---- calling ops


def below_autograd() -> AbstractContextManager[None]:
    """Call ops without noting a gradient: the way through Python that notes one costs 10 microseconds."""
    return torch._C._AutoDispatchBelowAutograd()


def below_subclasses() -> AbstractContextManager[None]:
    """Call functions of tensors without `__torch_function__` of their classes being asked again."""
    return torch._C.DisableTorchFunctionSubclass()


def is_transformed() -> bool:
    """Whether a transform of torch.func, such as vmap, is on."""
    return torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def onednn_linear(x: Tensor, weight: Tensor) -> None:
    """Multiply as torch.compile's code does; nothing where torch was built without it."""
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
