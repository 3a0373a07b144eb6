"""prepare: turns a model into a PeftModel whose layers run nf4lora's kernels."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BitsAndBytesConfig

from nf4lora.compat.peft import get_peft_model
from nf4lora.loss.causal_lm import chunk_loss, has_chunked_loss
from nf4lora.memory import heap, onednn
from nf4lora.nn.model_tree import unchanged_on_failure
from nf4lora.preparation.plan import Plan, plan_preparation
from nf4lora.preparation.report import Report, report
from nf4lora.quantization.config import NF4Config
from nf4lora.quantization.quantize_model import pack

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


class _Shown(logging.Handler):
    """Prints each log record, so that scripts and notebooks show it without setting up logging."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))


logger = logging.getLogger("nf4lora")
if not logger.handlers:  # a program that has set up this logger keeps its own handlers
    logger.addHandler(_Shown())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # else a root handler would print it again


@dataclass(frozen=True)
class Prepared:
    """What `apply` did: the model, a line that describes the changes, and warnings."""

    model: PeftModel
    said: str  # "" where nothing was changed
    warned: tuple[str, ...]


def prepare(
    model: nn.Module,
    lora_config: LoraConfig | None = None,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    target_modules: str | list[str] | None = None,
    quantization_config: NF4Config | BitsAndBytesConfig | None = None,
    **lora_options: Any,
) -> PeftModel:
    """Freeze a model in NF4 and add LoRA, computed in one op a layer; returns a PeftModel for any trainer.

    The model may be in 16 or 32 bits (its linear layers are quantised in place, one by one, on their own device),
    loaded with `NF4Config`, loaded by bitsandbytes (its packed bytes are used without a copy), or a PeftModel over any
    of these, which keeps its adapters. Embeddings, norms and the output head stay as they are, and only the dtypes that
    the logged line names change. Adapters are float32. Gradient checkpointing is left to the trainer. A call with
    `labels` then computes its loss in chunks, where the model's head allows it (`loss.causal_lm.chunk_loss`), and its
    `logits` only when they are read.

    The head of a classifier, and all other parameters that were in no checkpoint, are trained in full and saved with
    the adapter. In a multimodal model the text part carries the adapters; the other parts are packed and frozen, unless
    target_modules names their layers. The logged line names all of this.

    Args:
        lora_config: a `peft.LoraConfig`, in place of single options
        r: rank of the adapters; 16 where left out
        lora_alpha: 32 where left out;  lora_dropout: 0.0
        target_modules: "all-linear" where left out
        lora_options: every other option of `peft.LoraConfig` by its name, such as use_rslora, use_dora,
            modules_to_save, exclude_modules; task_type is that of the model's class
        quantization_config: how to pack a model that is still in 16 or 32 bits

    The logger "nf4lora" logs one line about the changes, and prints it unless it is set up otherwise.

    For a model that `prepare` returned, the same options return it unchanged, and other options are an error. For
    another PeftModel the given options are compared with its adapter. If an interrupted `prepare` has packed a part of
    the model, another call packs the rest.

    Raises:
        TypeError: an unknown option, or one of the wrong kind; model is not an nn.Module.
        ValueError: no module matches target_modules, or the output head does; the model has no linear layer, is merged,
            carries an adapter with other options, or is quantised in another way; a weight contains NaN; PEFT raises an
            error. The model is unchanged then.

    >>> model = prepare(model, r=16, lora_alpha=32)                         # doctest: +SKIP
    nf4lora: 210 layers from bfloat16 to NF4 (4.13 bits per weight); float32 adapters of rank 16 on 210 layers; ...
    """
    single = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": target_modules}
    given = {name: value for name, value in single.items() if value is not None} | lora_options
    plan = plan_preparation(model, lora_config, given, quantization_config)
    for line in plan.warned:
        warnings.warn(f"prepare: {line}", stacklevel=2)
    prepared = apply(plan, model)
    for line in prepared.warned:
        warnings.warn(f"prepare: {line}", stacklevel=2)
    if prepared.said:
        logger.info("nf4lora: %s", prepared.said)
    return prepared.model


def apply(plan: Plan, model: nn.Module) -> Prepared:
    """Carry out a plan that was just made for this model.

    If this is interrupted (out of memory, Ctrl-C), some layers of the model may be packed, but no part of an adapter is
    left in it. Another call of `prepare` then does the rest.
    """
    from peft import PeftModel

    from nf4lora.adapters import lora_layer

    onednn.bound_caches()
    base: Any = plan.base
    packed = pack(base, plan.packing)
    lora_layer.install()
    prepared: Any = model
    with unchanged_on_failure(base):
        if plan.lora is not None:
            prepared = get_peft_model(base, copy.deepcopy(plan.lora))
            prepared.nf4lora_asked = plan.asked
        fused = lora_layer.fuse(model) if isinstance(model, PeftModel) else 0
        chunked = (chunk_loss(base) or plan.lora is not None) and has_chunked_loss(base)
        heap.keep_small(base)
        if _recomputes(base):
            base.enable_input_require_grads()  # for reentrant checkpointing; PEFT omits it for a quantised model
        if not (packed or plan.lora or fused or chunked):
            return Prepared(prepared, "", ())
        contents = report(prepared)
        unpacked = contents.mostly_unpacked()
        summary = _summary(plan, packed, fused, chunked, contents)
        return Prepared(prepared, summary, (unpacked,) if unpacked else ())


def _recomputes(base: Any) -> bool:
    """Whether activations are recomputed; transformers renamed the attribute in 5.23 and warns of the former name."""
    if hasattr(base, "is_activation_checkpointing"):
        return base.is_activation_checkpointing
    return getattr(base, "is_gradient_checkpointing", False)


def _summary(plan: Plan, packed: list[str], fused: int, chunked: bool, contents: Report) -> str:
    parts = list(packed)
    if plan.packing.blocksizes and contents.bits_per_weight:
        parts[0] += f" ({contents.bits_per_weight:.2f} bits per weight)"
    if plan.lora is not None:
        parts += [f"float32 adapters of rank {plan.asked.r} on {contents.adapted_layers} layers", *plan.said]
    parts += [f"the fused op under the adapters of {fused} layers"] if fused else []
    parts += ["a loss that never holds all logits"] if chunked else []
    share = contents.trainable / max(contents.parameters, 1)
    return f"{'; '.join(parts)}; {share:.2%} of {contents.parameters / 1e6:.1f} M parameters train"
