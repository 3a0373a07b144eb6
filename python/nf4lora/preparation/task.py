"""PEFT's task type for a model's class, and the part of a multimodal model that works on text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

# PEFT's task, transformers' list of classes for it, and the endings of class names that are in no list (custom code).
HEADS = (
    ("SEQ_CLS", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, ("ForSequenceClassification",)),
    ("TOKEN_CLS", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, ("ForTokenClassification",)),
    ("QUESTION_ANS", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, ("ForQuestionAnswering",)),
)
CAUSAL = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ("ForCausalLM", "LMHeadModel"))
SEQ_TO_SEQ = (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, ("ForConditionalGeneration",))
BARE = (auto.MODEL_MAPPING_NAMES, ("Model",))
# Families whose language model answers about images or sound.
WRAPPERS = {
    **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type, which decides on the class of the PeftModel and on the Auto class that loads a saved folder.

    The type is CAUSAL_LM for a decoder of text, SEQ_2_SEQ_LM for an encoder-decoder of text, SEQ_CLS, TOKEN_CLS or
    QUESTION_ANS by the head, and FEATURE_EXTRACTION for a text model without a head. The type is None where PEFT's
    class would call the model wrongly: the main input is not text (speech, images), or no Auto class for the task loads
    the model. PEFT then saves the name of the model's own class, and `AutoPeftModel` loads that.
    """
    if not isinstance(model, PreTrainedModel) or not _reads_text(model):
        return None
    for task, names, endings in HEADS:
        if _is_one_of(model, names, endings):
            return task
    if model.config.is_encoder_decoder:
        if model.can_generate():
            return "SEQ_2_SEQ_LM" if _is_one_of(model, *SEQ_TO_SEQ) and len(_modalities(model)) == 1 else None
    elif model.can_generate():
        return "CAUSAL_LM" if _is_one_of(model, *CAUSAL) else None
    return "FEATURE_EXTRACTION" if len(_modalities(model)) == 1 and _is_one_of(model, *BARE) else None


def text_part(model: nn.Module) -> str | None:
    """The name of the language model inside a multimodal model that answers in text; None for any other model."""
    if not isinstance(model, PreTrainedModel) or not _reads_text(model) or len(_modalities(model)) == 1:
        return None
    if not model.can_generate() and model.config.model_type not in WRAPPERS:
        return None
    try:
        config, part = model.config.get_text_config(), model.get_decoder()
    except (ValueError, AttributeError):  # several text configurations: the model also makes speech or images
        return None
    if config is model.config or part is model:
        return None
    name = next((name for name, module in model.named_modules() if module is part), "")
    # The base model under the head holds everything and is not a part.
    others = any(isinstance(module, PreTrainedModel) for module in _outside(model, part))
    return name if name and others else None


def _outside(model: nn.Module, part: nn.Module) -> Iterable[nn.Module]:
    inside = {id(module) for module in part.modules()}
    around = {id(module) for module in model.modules() if any(child is part for child in module.modules())}
    return (module for module in model.modules() if id(module) not in inside | around)


def _reads_text(model: PreTrainedModel) -> bool:
    return model.main_input_name == "input_ids" and "text" in _modalities(model)


def _modalities(model: PreTrainedModel) -> tuple[str, ...]:
    modalities: Any = getattr(model, "input_modalities", "text")
    return (modalities,) if isinstance(modalities, str) else tuple(modalities)


def _is_one_of(model: PreTrainedModel, names: dict[str, Any], endings: tuple[str, ...]) -> bool:
    """Whether the Auto class with this list loads this class of model, by the type in its configuration."""
    name, opened = type(model).__name__, names.get(model.config.model_type)
    if opened is not None:
        return name in ((opened,) if isinstance(opened, str) else opened)
    return not type(model).__module__.startswith("transformers.") and name.endswith(endings)
