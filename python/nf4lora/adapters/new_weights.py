"""Which parameters of a model were in no checkpoint: a classifier's new head, a pooler, a grown vocabulary.

These parameters are initialised at random, so an adapter is useless without them: they must be trained and saved with
it. transformers marks each parameter that it sets from a file. The mark is lost when the user or transformers replaces
the parameter by a scaled, untied or dequantised one, so the names of the marked parameters are also recorded on the
model while it is loaded. A model that was built from its configuration alone has neither marks nor names; then only its
class tells which module is the head of a new task.
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

HELD_NAMES = "nf4lora_held_names"  # attribute of a model: the names of the parameters that its checkpoint held


def install() -> None:
    """Record on each model that transformers loads which parameters the checkpoint held. A second call does nothing.

    The names are read just before transformers draws the missing parameters at random: all others have their mark then.
    Where a release of transformers has no such step, `_held_by_class` finds the names.
    """
    before_missing_are_drawn(note_held_names)


def note_held_names(model: Any) -> None:
    """Record the names of the parameters that were set from a file as an attribute of the model."""
    named = model.named_parameters(remove_duplicate=False)
    model.__dict__[HELD_NAMES] = {name for name, tensor in named if was_loaded(tensor)}


def marked_as(parameter: nn.Parameter, source: torch.Tensor) -> nn.Parameter:
    """The parameter, marked as set from a file if the tensor that it was made from has this mark."""
    if was_loaded(source):
        mark_initialized(parameter)
    return parameter


def task_heads(model: nn.Module) -> list[str]:
    """Names of the heads for tasks other than language modelling, children of the model: classifier, score, qa_outputs.

    These heads are small and are trained together with an adapter, so they stay in 16 bits.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return []
    if output_head(model) is not None:  # logits of tokens
        return []
    trained = (name for name, child in model.named_children() if next(child.parameters(), None) is not None)
    return [name for name in trained if name != model.base_model_prefix]


def new_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that no checkpoint held; empty where no parameter of the model came from a file.

    A parameter whose name was in the checkpoint is not new, even if it has been replaced since. The exception are
    layers at either end of the model: one that replaces the loaded layer is new, such as a user's own head or the
    embedding of a resized vocabulary.
    """
    if not isinstance(model, PreTrainedModel):
        return set()
    in_checkpoint = getattr(model, HELD_NAMES, None)
    if in_checkpoint is None and not any(map(was_loaded, model.parameters())):
        return set()
    in_checkpoint = _held_by_class(model) if in_checkpoint is None else in_checkpoint
    is_computed = computed_by_model(model)
    packed = {id(tensor) for layer in model.modules() if isinstance(layer, NF4Linear) for tensor in layer.parameters()}
    replaced = _replaced_ends(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if not was_loaded(parameter)
        and id(parameter) not in packed
        and (base_name(name) not in in_checkpoint or id(parameter) in replaced)
        and not is_computed(name)
    }


def _replaced_ends(model: nn.Module) -> set[int]:
    """The `id` of each parameter in an embedding, output head or task head that has replaced the loaded one.

    transformers marks every module of a model that it loads. When a vocabulary grows, it replaces both the embedding
    and the output head, and marks only one of them.
    """
    ends = [list(layer.modules()) for layer in token_layers(model)]
    tokens = [module for layer in ends for module in layer]
    heads = [list(model.get_submodule(name).modules()) for name in task_heads(model)]
    replaced: set[int] = set()
    for modules in (tokens, *heads):
        layers = [module for module in modules if parameters_of(module)]
        if not all(map(is_initialized, layers)):
            replaced |= {id(parameter) for module in layers for parameter in module.parameters(recurse=False)}
    return replaced


def _held_by_class(model: Any) -> set[str]:
    """Names of the parameters in the class that was saved, for a model that was loaded before nf4lora was imported.

    This is a guess. The head of a task is left out, because the saved one may have had another number of classes.
    """
    heads = tuple(f"{name}." for name in task_heads(model))
    missing = not_in_checkpoint(model)
    names = {base_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name for name in names if name not in missing and not name.startswith(heads)}


def modules_of(model: nn.Module, parameters: set[str]) -> tuple[list[str], list[str]]:
    """The fewest modules that hold these parameters, and the parameters that are in none of these modules.

    A module is listed, instead of its children, if all of its parameters are among the given ones. A module that also
    has other parameters is listed only if it has no children.
    """
    modules: list[str] = []
    for name, module in model.named_modules():
        names = {f"{name}.{key}" for key, _ in module.named_parameters()}
        inside = any(name.startswith(f"{above}.") for above in modules)
        if (
            name
            and names
            and not inside
            and (names <= parameters or (names & parameters and not list(module.children())))
        ):
            modules.append(name)
    covered = tuple(f"{name}." for name in modules)
    return modules, sorted(name for name in parameters if not name.startswith(covered))


def not_in_checkpoint(model: Any) -> set[str]:
    """Parameters that a checkpoint cannot hold, since it was saved from a model of another class; used before loading.

    The saved class is built on the meta device, and the names of its parameters are compared with the model's.
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
    except Exception:  # a class of another version may raise anything; the model is checked again after loading
        return set()
    in_saved_class = {name.removeprefix(f"{other.base_model_prefix}.") for name, _ in other.named_parameters()}
    names = {base_name(name) for name, _ in model.named_parameters()}
    return {name for name in names if name.removeprefix(f"{model.base_model_prefix}.") not in in_saved_class}


def grown_vocabulary(model: nn.Module) -> int | None:
    """The checkpoint's number of embedding rows, if the model has another number; None where they are equal.

    The number is read from the checkpoint's configuration; None too where that is not on this machine.
    """
    config, embedding = getattr(model, "config", None), input_embedding(model)
    path, weight = path_of(config), getattr(embedding, "weight", None)
    if not path or weight is None or not any(map(was_loaded, model.parameters())):
        return None
    try:  # local files only: this must not wait for a network
        saved = type(config).from_pretrained(path, local_files_only=True)  # type: ignore[union-attr]
        rows, now = (side.get_text_config().vocab_size for side in (saved, config))  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return None
    return rows if rows != now else None
