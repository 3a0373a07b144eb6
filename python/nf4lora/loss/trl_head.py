"""TRL's fused output head on a CPU, with the memory of ours.

TRL's trainers replace a model's forward by one that scores tokens by tiles of 4,096 tokens and 32,768 words
(`trl.trainer.utils.add_fused_lm_head`). Its kernels need Triton. On a CPU a tile is float32 and has several temporary
copies, and tokens without a label are scored too, which takes about ten times the memory of our loss and more than the
model's own. So a call for SFTTrainer's numbers is taken over where ours are the same: the head is frozen and plain,
with no temperature, scale or cap. Anything else, and any release of TRL in which this looks different, is left to TRL.
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

TAKEN_OVER = "taken_over_by_nf4lora"  # in place of TRL's own argument, fused_lm_head
# What SFTTrainer asks add_fused_lm_head for, by the names of its variables (trl 1.16).
SFT = {
    "temperature": 1.0,
    "cast_lm_head_to_fp32": False,
    "outputs": ("log_probs", "entropy", "is_top1"),
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "backbone_attr": "base_model",
}


def take_over(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A hook before a model's forward: sends a call of TRL's head on a CPU to `score`."""
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
    """What TRL's fused forward returns: log-probability, entropy and correctness of each labelled token, else zeros."""
    hidden = base.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
    if shift_labels is None:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    else:
        labels = shift_labels
    head: Any = output_head(base)
    mask = labels != -100
    found = CrossEntropy.apply(hidden[mask], head.weight, head.bias, labels[mask], (), None, True)
    log_p, correct, entropy = (each.new_zeros(mask.shape).masked_scatter(mask, each) for each in found)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return sys.modules["trl.trainer.utils"].FusedCausalLMOutput(
        loss=-log_p.sum() / count, log_probs=log_p, entropy=entropy, is_top1=correct, label_mask=mask
    )
