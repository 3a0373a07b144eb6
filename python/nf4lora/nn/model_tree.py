"""A model as a tree of modules: its names without PEFT's wrappers, replacing a layer everywhere, undoing changes."""

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

WRAPPED = ("base_layer", "original_module")  # what PEFT calls the layer that it put another around


def nf4_layers(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """The NF4 layers in module order, under the names that they had before PEFT wrapped the model."""
    for name, module in base_of(model).named_modules():
        if isinstance(module, NF4Linear):
            yield base_name(name), module


def base_of(model: nn.Module) -> nn.Module:
    """The model under `torch.compile` and PEFT's wrapper; adapters stay in its layers."""
    model = uncompiled(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that turns tokens to vectors; None where the model has none."""
    return _asked(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits of tokens; None where the model has none."""
    return _asked(model, "get_output_embeddings")


def token_layers(model: nn.Module) -> list[nn.Module]:
    """Of input embedding and output head those that the model has."""
    return [layer for layer in (input_embedding(model), output_head(model)) if layer is not None]


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    try:
        layer = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):  # a model without one says so in these ways
        return None
    return layer if isinstance(layer, nn.Module) else None


def base_name(name: str) -> str:
    """Name of a module or tensor without what PEFT's layers put into it."""
    return ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part not in WRAPPED)


def adapter_names(model: nn.Module) -> set[str]:
    """Names of the modules and tensors that PEFT put into a model: adapters, and copies of layers trained in full.

    A wrapper is known by its shape, not its class, so that PEFT need not be there.
    """
    names: set[str] = set()
    for prefix, module in model.named_modules():
        kept = next((child for child in WRAPPED if child in children_of(module)), None)
        if kept is None:
            continue
        start = f"{prefix}." if prefix else ""
        names |= {start + name for name, _ in module.named_parameters(recurse=False)}
        for key, child in module.named_children():
            if key != kept:
                inside = [name for name, _ in child.named_modules(remove_duplicate=False) if name]
                inside += [name for name, _ in child.named_parameters(remove_duplicate=False)]
                inside += [name for name, _ in child.named_buffers(remove_duplicate=False)]
                names |= {start + key} | {f"{start}{key}.{name}" for name in inside}
    return names


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the model as if PEFT had never been there: its own names, no adapter."""
    model = base_of(model)
    of_adapters = adapter_names(model)
    return {base_name(name): tensor for name, tensor in model.state_dict().items() if name not in of_adapters}


def replace_layers(model: nn.Module, names: Iterable[str], make: Callable[[str, Any], nn.Module]) -> None:
    """Put `make(name, layer)` in the place of each named layer, in every place where that layer stands.

    A layer that is shared stays shared: it is made once, from the first of its names. Layers are replaced one at a
    time, and the old one is let go of before the next is made, so that at most one exists twice. Hooks on a layer go
    over to the new one.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in children_of(parent).items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, key))
    done: set[int] = set()
    for name in names:
        old: Any = model.get_submodule(name)
        if id(old) in done:
            continue
        new = make(name, old)
        move_hooks(old, new)
        move_hook(old, new)
        for parent, key in places[id(old)]:
            setattr(parent, key, new)
        done.add(id(new))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run what is inside in eval mode; afterwards each module has the mode that it had, which may differ in one model.

    `model.train(True)` would also switch on the dropout of a part that was frozen in eval mode.
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
    """Draw random numbers inside without changing those that follow: Python's, torch's, and those of CUDA devices.

    A data loader, for one, draws a seed when it starts.

    Args:
        devices: on CUDA; None: all
    """
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, Ctrl-C too, leaves the tree of modules and who is trained as they were before.

    Attributes of the model itself come back too; tensors that were written into do not.
    """
    modules = [
        (module, dict(children_of(module)), dict(forward_hooks_of(module)), module.training)
        for module in model.modules()
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = attributes_of(model)
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
        for key in attributes_of(model).keys() - own.keys():
            del vars(model)[key]
        vars(model).update(own)
        raise
