"""Tokenizer and model of a run, as the options ask for them."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nf4lora.train.chat.processor_template import processor_template
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.reach import as_pattern, unreached
from nf4lora.train.settings import TrainConfig
from nf4lora.words import listed

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Base:
    """What a base model says of itself before its weights are loaded."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stops: list[str]  # tokens that end generation
    quantized: str  # the method that the checkpoint is quantised with, or nothing
    note: str  # what is to be said about its chat template, or nothing

    @property
    def positions(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int | None:
        return getattr(self.config.get_text_config(), "vocab_size", None)


def read_base(config: TrainConfig) -> Base:
    """The configuration and the tokenizer of the base model.

    Raises:
        UsageError, RunError: they cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    name = config.model_name_or_path or ""
    if (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1) and not os.path.isdir(name):
        raise UsageError(f"model_name_or_path: {name} is not a folder")
    with failures(f"cannot load the tokenizer of {name}"):
        model_config = AutoConfig.from_pretrained(name, revision=config.model_revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.model_revision)
    if not tokenizer.eos_token and not tokenizer.pad_token:
        raise RunError(f"the tokenizer of {name} has neither an end token nor a padding token")
    size = getattr(model_config.get_text_config(), "vocab_size", None)
    if not tokenizer.pad_token or (size and tokenizer.eos_token and tokenizer.pad_token_id >= size):
        tokenizer.pad_token = tokenizer.eos_token  # padded labels are -100 whatever the token, but it is looked up
    stops: list[str] = []
    with contextlib.suppress(OSError, ValueError):  # many models have no generation_config.json
        ends = GenerationConfig.from_pretrained(name, revision=config.model_revision or "main").eos_token_id
        ids = [ends] if isinstance(ends, int) else ends or []
        stops = [token for token in tokenizer.convert_ids_to_tokens(ids) if token]
    note = take_processor_template(config, tokenizer)
    return Base(model_config, tokenizer, stops, quantization_of(model_config), note)


def take_processor_template(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Give a tokenizer without a chat template the one that its checkpoint has for the processor; says so.

    Raises:
        RunError: it cannot be read, and no other one is named.
    """
    if tokenizer.chat_template:
        return ""
    try:
        template = processor_template(config.model_name_or_path or "", config.model_revision)
    except RunError:
        if config.chat_template is None:
            raise
        return ""
    if template is None:
        return ""
    tokenizer.chat_template, file = template
    return f"the chat template is that of the processor ({file})"


def quantization_of(model_config: PreTrainedConfig) -> str:
    """Method that a checkpoint is quantised with, or nothing."""
    quantization = getattr(model_config, "quantization_config", None) or {}
    return str((quantization if isinstance(quantization, dict) else quantization.to_dict()).get("quant_method", ""))


def auto_class(model_config: PreTrainedConfig, name: str) -> Any:
    """The class of transformers that opens a checkpoint as what it was saved from: a language model, or one that reads
    images too and whose text part is trained.

    Raises:
        RunError: it is neither.
    """
    import transformers
    from transformers.models.auto import modeling_auto as known

    kind, saved = model_config.model_type, (model_config.architectures or [""])[0]
    text = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    wrapper = known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    if wrapper and (saved == wrapper or not text):
        return transformers.AutoModelForImageTextToText
    if (not text and not getattr(model_config, "auto_map", None)) or model_config.is_encoder_decoder:
        raise RunError(
            f"{name} is a {saved or kind}; nf4lora train trains models that continue a text (decoder-only language "
            "models, and the text part of those that read images too)"
        )
    return transformers.AutoModelForCausalLM


def load_model(config: TrainConfig, base: Base, device: str, dtype: torch.dtype) -> Any:
    """The base model: quantised as it is loaded, or as its checkpoint has it.

    Raises:
        UsageError: the checkpoint is quantised already and the options deny it.
        RunError: it cannot be loaded, or lacks a tensor.
    """
    from nf4lora.quantization.config import NF4Config

    name = config.model_name_or_path or ""
    options: dict[str, Any] = {"revision": config.model_revision, "dtype": dtype, "device_map": {"": device}}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    method = base.quantized
    if method:
        if not config.load_in_4bit:
            raise UsageError(f"load_in_4bit false, but {name} is quantised already ({method})")
        options["config"] = base.config
        if method == "bitsandbytes":
            with failures(f"cannot use {name}"):
                adopted = NF4Config.from_bnb(base.config.quantization_config)
                options["config"] = copy.deepcopy(base.config)
                options["config"].quantization_config = adopted.to_dict()
        elif method != "nf4lora":
            raise RunError(f"{name} is quantised with {method}; give the 16-bit model, or one in NF4")
    elif config.load_in_4bit:
        options["quantization_config"] = NF4Config(double_quant=config.bnb_4bit_use_double_quant)
    with failures(f"cannot load {name}"):
        model, about = auto_class(base.config, name).from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(about["missing_keys"]):  # transformers fills them with random numbers
        raise RunError(
            f"cannot load {name}: the checkpoint must hold every tensor of {type(model).__name__}, got none for "
            f"{listed(missing)}"
        )
    return model


def add_adapters(config: TrainConfig, model: Any, ids: Iterable[int]) -> tuple[PeftModel, list[str]]:
    """-> the PeftModel to train, and what is to be said about it. `ids` are tokens of the training data.

    Raises:
        RunError: the options do not fit the model.
    """
    from peft import LoraConfig

    from nf4lora.compat.peft import get_peft_model
    from nf4lora.memory import heap, onednn
    from nf4lora.preparation.plan import plan_preparation
    from nf4lora.preparation.prepare import apply

    lines, excluded = [], config.lora_exclude_modules
    if excluded is None and (names := unreached(model, ids, config.lora_target_modules)):
        excluded = as_pattern(names)
        lines.append(
            f"text does not pass through {listed(names, 6)}: no adapters there (lora_exclude_modules changes that)"
        )
    # Where embedding and head are one tensor, training a copy of one would part them without a word.
    tied = bool(config.modules_to_save and getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    if tied:
        lines.append("the embedding and the output head are one tensor, and are trained as one")
    with failures("cannot put adapters on the model"):
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            exclude_modules=excluded,
            target_parameters=config.lora_target_parameters,
            modules_to_save=config.modules_to_save,
            ensure_weight_tying=tied,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            task_type="CAUSAL_LM",
            revision=config.model_revision,
        )
        if not config.load_in_4bit:
            onednn.bound_caches()
            heap.keep_small(model)
            model = get_peft_model(model, lora)
            lines += unmatched(model, config.lora_target_modules)
            return in_float32(model), lines
        plan = plan_preparation(model, lora)
        done = apply(plan, model)
        lines += [line for line in (done.said, *plan.warned, *done.warned) if line]
        return in_float32(done.model), lines


def unmatched(model: Any, targets: str | list[str]) -> list[str]:
    """Names in lora_target_modules that no layer has, which PEFT accepts in silence as long as another one fits."""
    targeted = model.base_model.targeted_module_names
    names = [] if isinstance(targets, str) else targets
    idle = [name for name in names if not any(layer == name or layer.endswith(f".{name}") for layer in targeted)]
    return [f"nothing is called {', '.join(idle)}, which lora_target_modules names"] if idle else []


def in_float32(model: PeftModel) -> PeftModel:
    """Modules that are trained in full come in the model's dtype; 8 bits of mantissa swallow Adam's small steps."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """What libraries refuse is the user's to mend: their words, without the way through their code."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, MemoryError) as error:
        raise RunError(f"{what}: {error or type(error).__name__}") from error
    except (TypeError, LookupError, AttributeError) as error:  # these may as well be a mistake in the code
        raise RunError(f"{what}: {type(error).__name__}: {error} (--traceback shows where)") from error
