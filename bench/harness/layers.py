"""One linear layer as each contender makes it, and the calls that are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4Linear
from nf4lora.ops.kernels import dispatch

from .contenders import ALPHA, RANK


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def of_bitsandbytes(weight: Tensor) -> Any:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(weight.device)


def with_lora(base: Any) -> Any:
    """PEFT's layer over the base, as get_peft_model makes it, with adapters in float32 and a B that is not zero."""
    import peft

    from nf4lora.adapters import lora_layer

    lora_layer.install()
    model: Any = nn.Module()
    model.layer = base
    model.is_loaded_in_4bit = not isinstance(base, NF4Linear)  # by which PEFT knows bitsandbytes' layers
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]), model)
    generator = torch.Generator().manual_seed(0)
    for parameter in (model.layer.lora_A["default"].weight, model.layer.lora_B["default"].weight):
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.02).to(base.weight.device)
    return model.layer


def taking(kernel: str, call: Callable) -> Callable:
    """The call with a kernel of dispatch.KERNELS forced on a GPU, in the forward and the backward pass."""

    def taken(*arguments: Any) -> Any:
        with dispatch.forcing(kernel):
            return call(*arguments)

    return taken


def forward(layer: Callable[[], nn.Module], x: Tensor, dy: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return layer()(x)


def both(layer: Callable[[], nn.Module], x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    module = layer()
    x = x.detach().requires_grad_()
    wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return torch.autograd.grad(module(x), wanted, dy)


CALLS: dict[str, Callable] = {"forward": forward, "both": both}
