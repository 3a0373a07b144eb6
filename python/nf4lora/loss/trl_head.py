"""Replaces TRL's fused output head on a CPU by the loss in chunks, which needs less memory.

TRL's trainers replace a model's forward by one that scores tokens in tiles of 4,096 tokens and 32,768 words
(`trl.trainer.utils.add_fused_lm_head`). Its kernels need Triton. On a CPU each tile is float32 with several temporary
copies, and tokens without a label are scored too: this takes about ten times the memory of our loss, and more than the
model's own. So `take_over` handles a call for SFTTrainer's numbers where our loss gives the same ones: the head is
frozen and plain, with no temperature, scale or cap. Every other call, and any release of TRL whose code differs, is
left to TRL.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora.loss.cross_entropy import CrossEntropy
from nf4lora.loss.deferred_logits import is_deferrable
from nf4lora.nn.model_tree import output_head

TAKEN_OVER = "taken_over_by_nf4lora"  # the argument that replaces TRL's own, fused_lm_head
# The options of add_fused_lm_head that SFTTrainer uses, by the names of its variables (trl 1.16).
SFT = {
    "temperature": 1.0,
    "cast_lm_head_to_fp32": False,
    "outputs": ("log_probs", "entropy", "is_top1"),
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "backbone_attr": "base_model",
}


def take_over(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A hook that runs before a model's forward and redirects a call of TRL's head on a CPU to `score`."""
    if torch.compiler.is_compiling() or not kwargs.get("fused_lm_head"):
        return None
    forward = getattr(vars(base).get("forward"), "__func__", None)
    if forward is None or getattr(forward, "__module__", "") != type(base).__module__:
        return None
    asked = inspect.getclosurevars(forward).nonlocals
    head: Any = output_head(base)
    routers = kwargs.get("output_router_logits") or getattr(asked.get("text_config"), "output_router_logits", False)
    same = (
        all(name in asked and asked[name] == value for name, value in SFT.items())
        and "trl.trainer.utils" in sys.modules
        and kwargs.get("labels") is not None
        and is_deferrable(head)
        and head.weight.device.type == "cpu"
        and not routers
    )
    return (args, {**kwargs, "fused_lm_head": False, TAKEN_OVER: True}) if same else None


def score(
    base: Any,
    *args: Any,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Any:
    """The output of TRL's fused forward: log p, entropy and correctness of each labelled token, zero for the others."""
    hidden = base.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
    if shift_labels is None:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    else:
        labels = shift_labels
    head: Any = output_head(base)
    mask = labels != -100
    results = CrossEntropy.apply(hidden[mask], head.weight, head.bias, labels[mask], (), None, True)
    log_p, correct, entropy = (values.new_zeros(mask.shape).masked_scatter(mask, values) for values in results)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return sys.modules["trl.trainer.utils"].FusedCausalLMOutput(
        loss=-log_p.sum() / count, log_probs=log_p, entropy=entropy, is_top1=correct, label_mask=mask
    )
