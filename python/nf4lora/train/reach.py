"""Which layers text passes through. A model with a vision tower has layers that no text ever reaches: an adapter there
would never be trained, and layers that a model leaves out (the key projections of layers that share their cache, say)
are no different.

A run has tokens, so it sends some through the model and sees which layers they reach. `preparation.task.text_part`,
which `prepare` asks, goes by the class of a model alone: it does not know of layers within the text part that are left
out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from nf4lora.train.errors import RunError

PROBE = 64  # tokens that are sent through the model to find out


def unreached(model: nn.Module, ids: Iterable[int], targets: str | list[str]) -> list[str]:
    """Names of the linear layers that are not called when the model reads these tokens, or of the parts of the model
    that hold nothing else; without parts that lora_target_modules names itself.

    Experts count as reached: which tokens are sent to them is not for a few tokens to say.
    """
    from transformers.pytorch_utils import Conv1D

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}
    called = {name for name in layers if "expert" in name}
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    row = torch.tensor([int(token) for token in ids][:PROBE], device=next(model.parameters()).device)[None]
    mode = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
    except Exception:  # a model that wants more than text: the check before training will say so
        return []
    finally:
        for module, training in mode.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    given, last = [targets] if isinstance(targets, str) else targets, {name.rpartition(".")[2] for name in called}
    dead = parts(layers.keys() - called, called)
    words = {name: name.rpartition(".")[2] for name in dead}
    return [name for name, word in words.items() if word in last or not any(word in target for target in given)]


def parts(dead: Collection[str], alive: Collection[str]) -> list[str]:
    """The fewest names that stand for all the dead layers and none that is alive.

    >>> parts({"tower.0.q", "tower.0.k", "text.1.k"}, {"text.0.k", "text.1.q"})
    ['text.1.k', 'tower']
    """
    inside = {name[:end] for name in alive for end in [*(at.start() for at in re.finditer(r"\.", name)), len(name)]}
    names = set()
    for name in dead:
        ends = [*(at.start() for at in re.finditer(r"\.", name)), len(name)]
        names.add(next((name[:end] for end in ends if name[:end] not in inside), name))
    return sorted(names)


def as_pattern(names: Iterable[str]) -> str:
    """A regex for PEFT's exclude_modules: these modules, and all that is in them."""
    return "(" + "|".join(map(re.escape, names)) + r")(\..*)?"


def check_reach(model: nn.Module, ids: Sequence[int], autocast: Callable[[], AbstractContextManager]) -> None:
    """Send a few tokens through the model, before anything is written, to see which adapters they reach.

    Args:
        ids: of the first training row
        autocast: the context in which training steps compute

    Raises:
        RunError: some would never be trained.
    """
    from nf4lora.nn.model_tree import unchanged_random_state

    row = torch.tensor(ids[:PROBE], device=next(model.parameters()).device)[None]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train()
    with unchanged_random_state(), autocast():
        loss = model(input_ids=row, attention_mask=torch.ones_like(row), labels=row, use_cache=False)["loss"]
        grads = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    refuse_unreached({name for name, grad in zip(trainable, grads, strict=True) if grad is None}, trainable)


def refuse_unreached(dead: Collection[str], trainable: Collection[str]) -> None:
    """
    Raises:
        RunError: an adapter would never be trained; names the option that leaves it out.
    """
    dead = sorted(name for name in dead if "expert" not in name)
    if not dead:
        return
    shown = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
    pattern = as_pattern(parts({layer_of(name) for name in dead}, {layer_of(name) for name in {*trainable} - {*dead}}))
    raise RunError(
        f"no gradient reaches {shown}: these would never be trained. Leave them out with\n"
        f"    --lora_exclude_modules '{pattern}'"
    )


def layer_of(name: str) -> str:
    """Name of the layer that an adapter's tensor belongs to, as PEFT compares it."""
    return re.split(r"\.(?:lora_|base_layer|modules_to_save)", name.removeprefix("base_model.model."))[0]
