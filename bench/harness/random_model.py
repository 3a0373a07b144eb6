"""Models of real shapes with random weights, in 4 bits and with LoRA, made where they run: no file is read.

A model is made layer by layer: each weight is drawn, packed and freed before the next one, so that the model in 16 bits
never exists whole. All contenders draw the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4Linear

from .contenders import ALPHA, OURS, RANK, start_alike
from .layers import linear, of_bitsandbytes

FEW_WORDS = "Llama-3.2-1B with few words"  # for the host's part alone: an embedding is one call, however large it is
SHAPES: dict[str, dict[str, Any]] = {  # options of LlamaConfig
    "Llama-3.1-8B": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
    },
    "Llama-3.2-1B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    },
    FEW_WORDS: {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    },
}
STD = 0.02  # of all weights but those of norms, which are one


def adapted(name: str, shape: str, device: str, layers: int | None = None) -> Any:
    """The model of one of SHAPES as a contender trains it: bf16, NF4 with double quantisation, adapters in float32.

    Args:
        name: contenders.OURS or contenders.RIVAL
        layers: how many of its blocks; None for all
    """
    model = packed(name, shape, device, layers)
    if name == OURS:
        import nf4lora

        model = nf4lora.prepare(model, r=RANK, lora_alpha=ALPHA)
    else:
        import peft

        model.is_loaded_in_4bit = True  # by which PEFT knows bitsandbytes' layers
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    start_alike(model)
    return model.train()


def packed(name: str, shape: str, device: str, layers: int | None = None) -> Any:
    """The model without adapters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    options = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(**options, max_position_embeddings=16384, use_cache=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if module is head and config.tie_word_embeddings:
            continue  # tie_weights gives it the embedding's
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # those of rotary embeddings, computed
            model.set_submodule(path, type(module)(config=config).to(device))
        elif isinstance(module, nn.Linear) and module is not head:
            weight = drawn(module.weight, device)
            made = NF4Linear.from_linear(linear(weight)) if name == OURS else of_bitsandbytes(weight)
            model.set_submodule(path, made)
        else:
            for key, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(drawn(parameter, device), requires_grad=False))
    model.tie_weights()
    return model


def drawn(parameter: Tensor, device: str) -> Tensor:
    """Values for a parameter without any: ones for a vector, which is a norm's, else N(0, STD)."""
    empty = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
    return empty.fill_(1) if parameter.dim() == 1 else empty.normal_(0, STD)
