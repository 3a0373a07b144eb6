"""What transformers' implementations of attention need. How packed rows stay apart is theirs: sdpa, eager and
flex_attention are given a mask that is made of the position_ids, FlashAttention the limits of each sample."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from nf4lora.words import dtype_name

if TYPE_CHECKING:
    import torch

FLASH = {  # the module and the package of each
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
KERNELS = "kernels"  # the package that fetches kernels from the Hub, FlashAttention's too


def missing(implementation: str, kind: str, dtype: torch.dtype) -> str:
    """What an implementation needs that is not here, as a sentence; nothing where all is there."""
    import torch

    if implementation in ("eager", "sdpa"):
        return ""
    if kind != "cuda":
        if implementation == "flex_attention":
            return "torch has no backward pass of it for a CPU; use sdpa"
        return "it needs an NVIDIA GPU, and this run is on the CPU; use sdpa"
    if implementation == "flex_attention":
        return ""
    from_hub = implementation not in FLASH
    if (not from_hub or "flash" in implementation) and dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bits only, and dtype is {dtype_name(dtype)}; use dtype bfloat16, or sdpa"
    if find_spec(KERNELS) is not None:
        return ""
    if from_hub:
        return f"kernels on the Hub need the package {KERNELS}: pip install {KERNELS}"
    module, package = FLASH[implementation]
    if find_spec(module) is None:
        return f"it needs the package {package}, or {KERNELS}, which fetches it from the Hub: pip install {KERNELS}"
    return ""
