"""Which parameters of a model were in no checkpoint: a classifier's new head, a pooler, a grown vocabulary.

They begin at random, so an adapter that is trained around them is worth nothing without them: they have to be trained
and saved with it. transformers marks what it sets from a file. A mark sits on the parameter itself, which a user or
transformers may replace by another that holds what the file held (scaled, untied, dequantised); so the names of the
marked ones are noted on the model while it is loaded. A model that was built from its configuration alone has neither,
and only its class says what is a head for a new task.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from nf4lora.compat.torch import parameters_of
from nf4lora.compat.transformers import (
    before_missing_are_drawn,
    computed_by_model,
    is_initialized,
    mark_initialized,
    path_of,
    was_loaded,
)
from nf4lora.nn.linear import NF4Linear
from nf4lora.nn.model_tree import base_name, input_embedding, output_head, token_layers

HELD_NAMES = "nf4lora_held_names"  # attribute of a model: of the parameters that its checkpoint held


def install() -> None:
    """Have transformers note on each model that it loads what the checkpoint held; a second call does nothing.

    Where it draws what is missing, all else has its mark. A release that does this elsewhere leaves the names to
    `_held_by_class`.
    """
    before_missing_are_drawn(note_held_names)


def note_held_names(model: Any) -> None:
    """Write the names of the parameters that were set from a file into the model."""
    named = model.named_parameters(remove_duplicate=False)
    model.__dict__[HELD_NAMES] = {name for name, tensor in named if was_loaded(tensor)}


def marked_as(parameter: nn.Parameter, source: torch.Tensor) -> nn.Parameter:
    """The parameter, marked as set from a file where the one it was made from is."""
    if was_loaded(source):
        mark_initialized(parameter)
    return parameter


def task_heads(model: nn.Module) -> list[str]:
    """Children that make something else than words of what the base model computes: classifier, score, qa_outputs.

    They are small, and who trains an adapter on such a model trains them: they stay in 16 bits.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    if output_head(model) is not None:  # logits of tokens
        return []
    trained = (name for name, child in model.named_children() if next(child.parameters(), None) is not None)
    return [name for name in trained if name != model.base_model_prefix]


def new_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that no checkpoint held; nothing where no parameter of the model came from a file.

    A parameter under a name that the checkpoint held is not new, whatever it was replaced by. But a layer at either end
    of the model is where it stands in the place of the one that was loaded: a head of the user's, a resized vocabulary.
    """
    if not isinstance(model, PreTrainedModel):
        return set()
    held = getattr(model, HELD_NAMES, None)
    if held is None and not any(map(was_loaded, model.parameters())):
        return set()
    held = _held_by_class(model) if held is None else held
    is_computed = computed_by_model(model)
    packed = {id(tensor) for layer in model.modules() if isinstance(layer, NF4Linear) for tensor in layer.parameters()}
    replaced = _replaced_ends(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if not was_loaded(parameter)
        and id(parameter) not in packed
        and (base_name(name) not in held or id(parameter) in replaced)
        and not is_computed(name)
    }


def _replaced_ends(model: nn.Module) -> set[int]:
    """`id` of the parameters of embedding, output head and heads of a task that are not the modules that were loaded.

    transformers marks every module of a model that it has loaded. When a vocabulary grows it replaces both ends, and
    marks one.
    """
    ends = [list(layer.modules()) for layer in token_layers(model)]
    tokens = [module for layer in ends for module in layer]
    heads = [list(model.get_submodule(name).modules()) for name in task_heads(model)]
    found: set[int] = set()
    for modules in (tokens, *heads):
        own = [module for module in modules if parameters_of(module)]
        if not all(map(is_initialized, own)):
            found |= {id(parameter) for module in own for parameter in module.parameters(recurse=False)}
    return found


def _held_by_class(model: Any) -> set[str]:
    """As well as can be told of a model that was loaded before nf4lora was imported: what the class that was saved has.

    The head of a task is left out: it may have had another number of classes.
    """
    heads = tuple(f"{name}." for name in task_heads(model))
    missing = not_in_checkpoint(model)
    names = {base_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name for name in names if name not in missing and not name.startswith(heads)}


def modules_of(model: nn.Module, parameters: set[str]) -> tuple[list[str], list[str]]:
    """The modules that hold these parameters, as few as possible, and the parameters that no such module holds.

    A module counts where all of its parameters are among them, and is then named instead of its children; one that
    holds others too counts only where it has no children.
    """
    modules: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        inside = any(name.startswith(f"{above}.") for above in modules)
        if name and own and not inside and (own <= parameters or (own & parameters and not list(module.children()))):
            modules.append(name)
    covered = tuple(f"{name}." for name in modules)
    return modules, sorted(name for name in parameters if not name.startswith(covered))


def not_in_checkpoint(model: Any) -> set[str]:
    """Parameters that a checkpoint cannot hold, since it was saved from a model of another class: asked before loading.

    The class that was saved is built without memory, and the names of both are compared.
    """
    saved = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    cls = getattr(transformers, saved, None)
    if saved == type(model).__name__ or not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        return set()
    if not isinstance(model.config, getattr(cls, "config_class", None) or ()):
        return set()
    try:
        with torch.device("meta"):
            other = cls(copy.deepcopy(model.config))
    except Exception:  # what a class of another version may raise has no end; the check after loading is still there
        return set()
    held = {name.removeprefix(f"{other.base_model_prefix}.") for name, _ in other.named_parameters()}
    names = {base_name(name) for name, _ in model.named_parameters()}
    return {name for name in names if name.removeprefix(f"{model.base_model_prefix}.") not in held}


def grown_vocabulary(model: nn.Module) -> int | None:
    """Rows of the embedding in the checkpoint, where the model has another number of them; None where it has not.

    Asks the configuration of the checkpoint, if it is on this machine.
    """
    config, embedding = getattr(model, "config", None), input_embedding(model)
    path, weight = path_of(config), getattr(embedding, "weight", None)
    if not path or weight is None or not any(map(was_loaded, model.parameters())):
        return None
    try:  # what is on this machine: nobody waits for a network here
        saved = type(config).from_pretrained(path, local_files_only=True)  # type: ignore[union-attr]
        rows, now = (each.get_text_config().vocab_size for each in (saved, config))  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return None
    return rows if rows != now else None
