"""What a card is held to: limits set before the kernels were written, for the compute capability 9.0."""

from __future__ import annotations

import torch

CAPABILITY = (9, 0)
LESS_MEMORY_BANDWIDTH = 0.05  # by which the ratios of an H100 may be larger than those of an H200

# Our time over that of cuBLAS's bf16 products of the base alone, both the card's own time, for all linear layers of a
# block of Llama-3.1-8B together, by pass and tokens.
LAYER = {
    "forward": {512: 1.65, 2048: 1.25, 4096: 1.15, 8192: 1.10},
    "forward and backward": {512: 1.70, 2048: 1.24, 4096: 1.16, 8192: 1.12},
    "with checkpointing": {2048: 1.18, 4096: 1.13, 8192: 1.10},
}
LAYER_OF = "Llama-3.1-8B"
# The latency of one call of any layer, forward and backward.
FEW, MANY = 512, 2048  # tokens: up to, and from
FEW_OF_BITSANDBYTES, MANY_OF_BITSANDBYTES = 0.35, 0.70
FEW_ABOVE_TORCH = 60e-6  # seconds more than F.linear without LoRA
# A step of training.
STEP_TOKENS = (2048, 4096)
STEP_OF_BITSANDBYTES = 0.70
MEMORY_OF_BITSANDBYTES = 1.0
BUSY = 0.85  # share of a step in which the card works


def allowance(device: str) -> float | None:
    """What to add to the limits that are ratios; None where this device is held to nothing here.

    An H200's limits hold as they are; the others of its architecture, of which the H100 was measured, read memory more
    slowly beside the same tensor cores.
    """
    if device != "cuda" or torch.cuda.get_device_capability() != CAPABILITY:
        return None
    return 0.0 if "H200" in torch.cuda.get_device_name() else LESS_MEMORY_BANDWIDTH


def at_most(claim: str, limit: float, value: float, *, digits: int = 2) -> tuple[str, bool]:
    """A target of a table, met where the value, rounded as it is shown, is not above the limit.

    >>> at_most("forward: {} of torch's time", 1.25, 1.2541)
    ("forward: at most 1.25 of torch's time, got 1.25", True)
    """
    value = round(value, digits)
    return claim.format(f"at most {limit:.{digits}f}") + f", got {value:.{digits}f}", value <= round(limit, digits)
