"""The private names of torch that nf4lora uses, each in one place.

Tested with torch 2.11 to 2.14. `tests/test_compat.py` fails where one of these names is gone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._pytree import tree_leaves, tree_map_only

from nf4lora.compat.accelerate import HOOK

__all__ = ["tree_leaves", "tree_map_only"]

OF_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module


# ---- modules: direct access to their dictionaries; getattr takes half a microsecond for each name


def children_of(module: nn.Module) -> dict[str, Any]:
    """The module's children by name; a child with several names appears under each of them."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """The module's own parameters by name."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The module's own buffers by name."""
    return module._buffers


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The module's attributes by name, with its dictionaries of parameters and hooks and without its children."""
    return {name: value for name, value in vars(module).items() if name != "_modules"}


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs any hook."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def is_called_plainly(module: nn.Module, cls: type) -> bool:
    """Whether a call of the module is one of `cls.forward` and nothing else, but for hooks of `hooks_every_module`.

    Not so with hooks, with a forward that accelerate or a user has replaced, with one that `compile()` has compiled, or
    for another class, which parametrizations and FSDP make.
    """
    state = module.__dict__
    return (
        type(module) is cls
        and not (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        )
        and "forward" not in state
        and HOOK not in state
        and state.get("_compiled_call_impl") is None
    )


def hooks_every_module() -> bool:
    """Whether a hook was registered for all modules together."""
    return bool(_has_any_global_hook())


def forward_pre_hooks_of(module: nn.Module) -> dict[int, Any]:
    """The hooks that run before the module's forward, by the number of their handle."""
    return module._forward_pre_hooks


def forward_hooks_of(module: nn.Module) -> dict[int, Any]:
    """The hooks that run after the module's forward, by the number of their handle."""
    return module._forward_hooks


def bare_copy(module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> Any:
    """A module of the same class and attributes with these tensors, without children, hooks or a replaced forward."""
    new: Any = type(module).__new__(type(module))
    attributes = {name: value for name, value in module.__dict__.items() if name not in ("forward", HOOK)}
    hooks: dict[str, Any] = {name: OrderedDict() for name in (*OF_CALLS, "_state_dict_hooks")}
    new.__dict__.update({**attributes, **hooks, "_parameters": parameters, "_buffers": buffers, "_modules": {}})
    return new


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move a module's hooks to the module that replaces it, in the same dictionaries, so that a user's handle still
    removes a hook.

    The hooks by which torch.nn.utils computes a weight from other tensors (weight_norm, spectral_norm, prune) are
    dropped: the new weight holds their result, and the new module does not have the other tensors.
    """
    pre_hooks = old._forward_pre_hooks
    for key in [key for key, hook in pre_hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")]:
        del pre_hooks[key]
    names = (*OF_CALLS, *(f"_forward{pre}_hooks_with_kwargs" for pre in ("", "_pre")), "_forward_hooks_always_called")
    new.__dict__.update({name: old.__dict__[name] for name in (*names, "_is_full_backward_hook")})


class Unreplicated:
    """Mixin of a module that torch.nn.DataParallel must not copy: it raises a RuntimeError with this text instead."""

    why_no_replica: str

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(self.why_no_replica)


def uncompiled(model: Any) -> Any:
    """The model under the wrapper of `torch.compile`, if it has one."""
    return getattr(model, "_orig_mod", model)


# ---- tensors


def version_of(tensor: Tensor) -> int:
    """A number that grows with every write into a tensor in place."""
    return tensor._version


def storage_address(tensor: Tensor) -> int:
    """A number that is equal for tensors that share their memory, even after that memory has moved."""
    return tensor.untyped_storage()._cdata


def as_subclass(cls: Any, tensor: Tensor) -> Any:
    """The tensor as an instance of this subclass, without a gradient."""
    return Tensor._make_subclass(cls, tensor, False)


def without_memory(cls: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of this subclass that has a shape but no memory."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def dtensor_like(tensor: Tensor, dtensor: Any) -> Any:
    """A DTensor over this tensor (not a copy), sharded as the other DTensor is."""
    return type(dtensor)(tensor, dtensor._spec, requires_grad=False)


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, in float32, computed in one call."""
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32))


def norms_in_groups(tensors: list[Tensor]) -> tuple[Tensor, list[int]]:
    """The 2-norms of tensors as torch.nn.utils.get_total_norm computes them: [n] on the device of the first tensor, one
    group of a device and dtype after the other, and the number of the tensor that each norm belongs to."""
    norms: list[Tensor] = []
    order: list[int] = []
    groups: Any = _group_tensors_by_device_and_dtype([list(tensors)], with_indices=True)
    for (group,), numbers in groups.values():
        norms += torch._foreach_norm(group, 2.0)
        order += numbers
    return torch.stack([norm.to(tensors[0].device) for norm in norms]), order


# ---- calling ops


def below_autograd() -> AbstractContextManager[None]:
    """Call ops without recording a gradient: recording one from Python costs 10 microseconds a call."""
    return torch._C._AutoDispatchBelowAutograd()


def running_backward() -> int | None:
    """The number of the backward pass that this thread works for; None outside of one. A forward pass inside of one is
    computed again for it."""
    number = torch._C._current_graph_task_id()
    return number if number >= 0 else None


def after_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def is_waiting(node: Any) -> bool:
    """Whether the node of a graph, an autograd.Function's, still holds what it saved for its backward pass."""
    try:
        node._raw_saved_tensors  # noqa: B018  # as they are: a hook would compute them again
    except RuntimeError:
        return False
    return True


def stream_of(tensor: Tensor) -> int:
    """The address of the CUDA stream that is current for the tensor's device; 0 for a tensor elsewhere."""
    return torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else 0


def below_subclasses() -> AbstractContextManager[None]:
    """Call functions of tensors without calling `__torch_function__` of their classes again."""
    return torch._C.DisableTorchFunctionSubclass()


def is_any_autocast_enabled() -> bool:
    """Whether autocast is on for any kind of device. (To find out which kind a tensor has takes half a microsecond.)"""
    return torch._C._is_any_autocast_enabled()


def is_transformed() -> bool:
    """Whether a transform of torch.func, such as vmap, is on."""
    return torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def onednn_linear(x: Tensor, weight: Tensor) -> None:
    """Compute a linear layer with the op that torch.compile uses; does nothing where torch was built without it."""
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
