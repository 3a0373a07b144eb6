"""One linear layer as each contender makes it, and the calls that are timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nf4lora import NF4Linear
from nf4lora.ops.kernels import dispatch

from .case import installed
from .composition import Composition
from .contenders import ALPHA, RANK

OURS = "nf4lora"
TORCH = "torch"  # bf16 without LoRA: cuBLAS's products of the base alone
TORCH_LORA = "torch + LoRA"
BITSANDBYTES = "bitsandbytes"
COMPOSITION = "composition"
TORCHAO = "torchao"
WHAT_THEY_ARE = {
    TORCH: "torch: F.linear in bf16 without any LoRA, the products of the base alone; its weight is frozen, so that "
    "its backward is dx",
    TORCH_LORA: "torch + LoRA: PEFT over torch.nn.Linear in bf16, adapters in float32, which is PEFT's default",
    BITSANDBYTES: "bitsandbytes: PEFT over Linear4bit, NF4 with double quantisation, adapters in float32",
    COMPOSITION: "composition: written for this bench after what Unsloth does: W unpacked whole into one buffer, "
    "torch's products, addmm for the low-rank term, backward by hand; adapters cast to bf16",
    TORCHAO: "torchao: PEFT over torch.nn.Linear whose weight is torchao's NF4 tensor, adapters in float32",
}
PACKAGES = {BITSANDBYTES: "bitsandbytes", TORCHAO: "torchao"}  # that a contender needs


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


def with_lora(base: Any, seed: int = 0) -> Any:
    """PEFT's layer over the base, as get_peft_model makes it, with adapters in float32 and a B that is not zero."""
    import peft

    from nf4lora.adapters import lora_layer

    lora_layer.install()
    model: Any = nn.Module()
    model.layer = base
    model.is_loaded_in_4bit = not isinstance(base, NF4Linear)  # by which PEFT knows bitsandbytes' layers
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]), model)
    A, B = model.layer.lora_A["default"].weight, model.layer.lora_B["default"].weight
    for parameter, drawn in zip((A, B), adapter(len(B), A.shape[1], base.weight.device, seed), strict=True):
        parameter.data = drawn
    return model.layer


def adapter(N: int, K: int, device: torch.device | str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A and B of every contender: [R, K] and [N, R] float32."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(shape, generator=generator) * 0.02 for shape in ((RANK, K), (N, RANK)))
    return A.to(device), B.to(device)


def of_torchao(weight: Tensor) -> nn.Linear:
    layer = linear(weight)
    layer.weight = nn.Parameter(_to_nf4()(weight), requires_grad=False)
    return layer


def _to_nf4() -> Callable[[Tensor], Tensor]:
    """torchao's function of that name, wherever its version has it; raises ImportError if it has none."""
    for module in ("torchao.quantization", "torchao.dtypes"):
        if function := getattr(importlib.import_module(module), "to_nf4", None):
            return function
    raise ImportError("torchao: to_nf4 must be in torchao.quantization or torchao.dtypes, got neither")


MAKERS: dict[str, Callable[[Tensor], nn.Module]] = {
    OURS: lambda weight: with_lora(NF4Linear.from_linear(linear(weight))),
    TORCH: lambda weight: linear(weight.clone()),
    TORCH_LORA: lambda weight: with_lora(linear(weight.clone())),
    BITSANDBYTES: lambda weight: with_lora(of_bitsandbytes(weight)),
    COMPOSITION: lambda weight: Composition(weight, *adapter(*weight.shape, weight.device), ALPHA / RANK),
    TORCHAO: lambda weight: with_lora(of_torchao(weight)),
}


def present() -> list[str]:
    """The contenders whose packages are installed, ours first."""
    return [name for name in MAKERS if name not in PACKAGES or installed(PACKAGES[name])]


def notes(names: Sequence[str]) -> list[str]:
    """What the rivals among these contenders are, and which are absent."""
    absent = [package for name, package in PACKAGES.items() if name not in names]
    return [
        *(WHAT_THEY_ARE[name] for name in names if name in WHAT_THEY_ARE),
        *(f"{package} is absent: not compared with" for package in absent),
    ]


def taking(kernel: str, call: Callable) -> Callable:
    """The call with a kernel of dispatch.KERNELS forced on a GPU, in the forward and the backward pass."""

    def taken(*arguments: Any) -> Any:
        with dispatch.forcing(kernel):
            return call(*arguments)

    return taken


# Each call has a tensor x of its own. Layers of ours that are called with the same one become a group: then one copy of
# a layer would compute the outputs of the next copies too, which would take no time.


def forward(layer: Callable[[], nn.Module], x: Tensor, dy: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return layer()(x.detach())


def both(layer: Callable[[], nn.Module], x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    module = layer()
    x = x.detach().requires_grad_()
    wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return torch.autograd.grad(module(x), wanted, dy)


CALLS: dict[str, Callable] = {"forward": forward, "both": both}
