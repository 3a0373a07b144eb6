"""The contenders of cases that run a whole model: each loads the same folder and adds LoRA of rank 16 to all linear
layers."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

RANK, ALPHA = 16, 32

OURS = "nf4lora"
RIVAL = "bitsandbytes + PEFT"
KBIT = "bitsandbytes + PEFT, prepare_model_for_kbit_training"  # as PEFT's guide says: everything else becomes float32
IN_BF16 = "bitsandbytes + PEFT, adapters in bf16"  # as TRL casts them
SIXTEEN = "bf16 LoRA"
EXACT = "the 4-bit weights in float32, PEFT"  # what the 4-bit contenders approximate in bf16


def load(name: str, folder: Path | str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model as the contender's users load it: in NF4 with double quantisation, or in 16 bits for SIXTEEN."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if name == OURS:
        import nf4lora

        options["quantization_config"] = nf4lora.NF4Config()
    elif name != SIXTEEN:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def adapted(name: str, folder: Path | str, checkpointing: bool = False, device: str = "cpu") -> Any:
    """The model with adapters, in training mode."""
    import peft

    if name == EXACT:
        model = load(OURS, folder, device, torch.float32).dequantize(torch.float32)
    else:
        model = load(name, folder, device)
    recompute = {"use_reentrant": False}
    if name == OURS:
        import nf4lora

        model = nf4lora.prepare(model, r=RANK, lora_alpha=ALPHA)
    else:
        if name == KBIT:
            model = peft.prepare_model_for_kbit_training(model, checkpointing, recompute)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=name != IN_BF16)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recompute)
    start_alike(model)
    return model.train()


def start_alike(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw each lora_A as PEFT does, but from its name and the seed, so that it is equal for all contenders."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
                bound = parameter.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5))
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(drawn)
