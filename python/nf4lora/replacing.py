"""Replacing modules of a model at every place where they stand, and undoing what was changed in it.

A module may stand at several places: a layer that two blocks share, or a block that is applied twice. `named_modules`
names each module once; replacing it under that name alone would leave the old one at its other places.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Places:
    """Where the modules of a model stand; built once, for many replacements.

    >>> shared = nn.Linear(2, 2)
    >>> model = nn.Sequential(shared, nn.ReLU(), shared)
    >>> Places(model).replace(shared, nn.Identity())
    >>> model[0] is model[2]
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.slots: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for parent in model.modules():  # each once, also a parent that stands at several places
            for key, child in parent._modules.items():
                if child is not None:
                    self.slots[id(child)].append((parent, key))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` wherever `old` stands, with the hook that accelerate may have put on `old`."""
        if hook := getattr(old, "_hf_hook", None):  # where the model is spread over devices
            from accelerate.hooks import add_hook_to_module, remove_hook_from_module

            remove_hook_from_module(old)
            add_hook_to_module(new, hook)
        slots = self.slots.pop(id(old))
        for parent, key in slots:
            parent._modules[key] = new
        self.slots[id(new)] = slots


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
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, Ctrl-C too, leaves the tree of modules and who is trained as they were before.

    Attributes of the model itself come back too; tensors that were written into do not.
    """
    modules = [
        (module, dict(module._modules), dict(module._forward_hooks), module.training) for module in model.modules()
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    own = {key: value for key, value in vars(model).items() if key != "_modules"}
    try:
        yield
    except BaseException:
        for module, children, hooks, mode in modules:
            for now, before in ((module._modules, children), (module._forward_hooks, hooks)):
                now.clear()
                now.update(before)  # type: ignore[arg-type]
            module.training = mode
        for parameter, required in trained:
            parameter.requires_grad_(required)
        for key in vars(model).keys() - own.keys() - {"_modules"}:
            del vars(model)[key]
        vars(model).update(own)
        raise
