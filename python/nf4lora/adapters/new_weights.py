"""Which parameters of a model were in no checkpoint: a classifier's new head, a pooler, a grown vocabulary.

They begin at random, so an adapter that is trained around them is worth nothing without them: they have to be trained
and saved with it. transformers marks what it sets from a file; a model that was built from its configuration alone has
no marks at all, and only its class says what is a head for a new task.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from nf4lora.nn.linear import NF4Linear
from nf4lora.nn.model_tree import input_embedding, output_head


def was_loaded(parameter: torch.Tensor) -> bool:
    """Whether a parameter was set from a file; what is on meta is offloaded, and accelerate has it."""
    return getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta


def marked_as(parameter: nn.Parameter, source: torch.Tensor) -> nn.Parameter:
    """The parameter, marked as set from a file where the one it was made from is."""
    if was_loaded(source):
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
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
    """Names of the parameters that no checkpoint held; nothing where no parameter of the model came from a file."""
    if not isinstance(model, PreTrainedModel) or not any(map(was_loaded, model.parameters())):
        return set()
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    packed = {id(tensor) for layer in model.modules() if isinstance(layer, NF4Linear) for tensor in layer.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if not was_loaded(parameter)
        and id(parameter) not in packed
        and not any(pattern.search(name) for pattern in ignored)  # computed by the model itself
    }


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
    return {
        name for name, _ in model.named_parameters() if name.removeprefix(f"{model.base_model_prefix}.") not in held
    }


def grown_vocabulary(model: nn.Module) -> int | None:
    """Rows of the embedding in the checkpoint, where the model has another number of them; None where it has not.

    Asks the configuration of the checkpoint, if it is on this machine.
    """
    config, embedding = getattr(model, "config", None), input_embedding(model)
    path, weight = getattr(config, "_name_or_path", None), getattr(embedding, "weight", None)
    if not path or weight is None or not any(map(was_loaded, model.parameters())):
        return None
    try:  # what is on this machine: nobody waits for a network here
        saved = type(config).from_pretrained(path, local_files_only=True)  # type: ignore[union-attr]
        rows, now = (each.get_text_config().vocab_size for each in (saved, config))  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return None
    return rows if rows != now else None
