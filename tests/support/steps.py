"""Parameters, and gradients drawn from seeds, for tests of the optimizer."""

import torch
from torch import nn


def parameters(sizes, dtype=torch.float32, device="cpu"):
    """The same values at each call."""
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in sizes]


def train(params, optimizer, steps):
    """A step of the optimizer for each of `steps`, whose gradients its number decides on."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
