"""Tiny packed models with adapters on them, and what tests compare: one training step, by a relative distance."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from nf4lora.adapters import lora_layer
from nf4lora.adapters.lora_layer import NF4LoraLinear
from nf4lora.nn.linear import NF4Linear

from support.models import tiny_llama

IDS = torch.randint(0, 259, (3, 17), generator=torch.Generator().manual_seed(7))


def packed_llama(**options):
    """A tiny Llama whose linear layers, but for the head, are NF4Linear."""
    layer_options = {key: options.pop(key) for key in ("compute_dtype", "double_quant") if key in options}
    model = tiny_llama(**{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, **options})
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, NF4Linear.from_linear(module, **layer_options))
    return model


def dequantised(model):
    """A copy of the model with plain float32 or 16-bit linear layers that hold the same weights."""
    model = copy.deepcopy(model)
    dtype = model.lm_head.weight.dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
            plain.weight.data = module.dequantize(dtype)
            plain.bias = module.bias
            model.set_submodule(name, plain)
    return model


def config(**options):
    """Rank 4 on all linear layers, B not zero, so that an adapter that is not applied shows."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**{**defaults, "task_type": "CAUSAL_LM", **options})


def adapted(model, **options):
    lora_layer.install()
    torch.manual_seed(1)
    return get_peft_model(model, config(**options))


def pair(model_options=None, **options):
    """Ours, and PEFT on the dequantised model with the very same adapter."""
    packed = packed_llama(**(model_options or {}))
    return adapted(copy.deepcopy(packed), **options), adapted(dequantised(packed), **options)


def layers(model):
    return [module for module in model.modules() if isinstance(module, NF4LoraLinear)]


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, seed=3, ids=IDS):
    """Logits and gradients of one training step."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def relative(a, b):
    """Distance over length: float32 sums in another order differ by less than 1e-5 of it through a whole model."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
