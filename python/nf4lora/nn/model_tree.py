"""A model as a tree of modules: names without PEFT's wrappers, replacing layers, and restoring a model's state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora.compat.accelerate import move_hook
from nf4lora.compat.torch import attributes_of, children_of, forward_hooks_of, move_hooks, uncompiled
from nf4lora.nn.linear import NF4Linear

WRAPPED = ("base_layer", "original_module")  # names under which PEFT's wrappers keep the layer inside


def nf4_layers(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """The NF4 layers in module order, under the names that they had before PEFT wrapped the model."""
    for name, module in base_of(model).named_modules():
        if isinstance(module, NF4Linear):
            yield base_name(name), module


def base_of(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile` and PEFT; its layers keep their adapters."""
    model = uncompiled(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that turns tokens into vectors; None where the model has none."""
    return _layer_from(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that computes the logits; None where the model has none."""
    return _layer_from(model, "get_output_embeddings")


def token_layers(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output head, as far as the model has them."""
    return [layer for layer in (input_embedding(model), output_head(model)) if layer is not None]


def _layer_from(model: nn.Module, method: str) -> nn.Module | None:
    try:
        layer = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):  # what a model without such a layer raises
        return None
    return layer if isinstance(layer, nn.Module) else None


def base_name(name: str) -> str:
    """The name of a module or tensor without the parts that PEFT's wrappers add."""
    return ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part not in WRAPPED)


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the modules and tensors that PEFT put into a model: adapters, and copies of layers trained in full.

    A wrapper is recognised by the names of its children, not by its class, so that PEFT need not be installed.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        wrapped = next((child for child in WRAPPED if child in children_of(module)), None)
        if wrapped is None:
            continue
        start = f"{prefix}." if prefix else ""
        names |= {start + name for name, _ in module.named_parameters(recurse=False)}
        for key, child in module.named_children():
            if key != wrapped:
                inside = [name for name, _ in child.named_modules(remove_duplicate=False) if name]
                inside += [name for name, _ in child.named_parameters(remove_duplicate=False)]
                inside += [name for name, _ in child.named_buffers(remove_duplicate=False)]
                names |= {start + key} | {f"{start}{key}.{name}" for name in inside}
    return names


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have without PEFT: its own names, and no adapter."""
    model = base_of(model)
    of_adapters = adapter_names(model)
    return {base_name(name): tensor for name, tensor in model.state_dict().items() if name not in of_adapters}


def replace_layers(model: nn.Module, names: Iterable[str], make: Callable[[str, Any], nn.Module]) -> None:
    """Replace each named layer by `make(name, layer)`, at every place of the model where that layer is used.

    A shared layer stays shared: its replacement is made once, from the first of its names. Layers are replaced one at a
    time, and the old layer is released before the next replacement is made, so that at most one layer exists twice.
    Hooks on a layer move to its replacement.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in children_of(parent).items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, key))
    new_ids: set[int] = set()
    for name in names:
        old: Any = model.get_submodule(name)
        if id(old) in new_ids:
            continue
        new = make(name, old)
        move_hooks(old, new)
        move_hook(old, new)
        for parent, key in places[id(old)]:
            setattr(parent, key, new)
        new_ids.add(id(new))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each module has its former mode again.

    The modes may differ within one model: `model.train(True)` would switch on the dropout of a part that was frozen in
    evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def unchanged_random_state(devices: Iterable[torch.device] | None = None) -> Iterator[None]:
    """Restore the random state of Python, torch and CUDA devices after the block, which may draw random numbers.

    A data loader, for example, draws a seed when it starts.

    Args:
        devices: the CUDA devices; None: all
    """
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Restore the tree of modules and each requires_grad if the block raises anything, KeyboardInterrupt included.

    Attributes of the model itself are restored too; the values of tensors are not.
    """
    modules = [
        (module, dict(children_of(module)), dict(forward_hooks_of(module)), module.training)
        for module in model.modules()
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = attributes_of(model)
    try:
        yield
    except BaseException:
        for module, children, hooks, mode in modules:
            for now, before in ((children_of(module), children), (forward_hooks_of(module), hooks)):
                now.clear()
                now.update(before)  # type: ignore[arg-type]
            module.training = mode
        for parameter, required in trained:
            parameter.requires_grad_(required)
        for key in attributes_of(model).keys() - attributes.keys():
            del vars(model)[key]
        vars(model).update(attributes)
        raise
