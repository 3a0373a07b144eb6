"""A layer with a batch for tests of a kernel of lora_linear, and claims that hold for every kernel."""

import pytest
import torch

from nf4lora import ops

RANK = 4


def drawn_layer(
    dtype, N, K, *, bias=True, lora=True, double_quant=True, dropout=0.0, blocksize=64, lead=(10,)
):  # fmt: skip
    """x [*lead, K], dy [*lead, N], the arguments that forward and backward share, and a bias [N]."""
    x, dy = torch.randn(*lead, K).to(dtype), torch.randn(*lead, N).to(dtype)
    qweight, absmax = ops.nf4_quantize(torch.randn(N, K) / K**0.5, blocksize)
    nested = None
    if double_quant:
        absmax, nested = ops.absmax_quantize(absmax)
    A, B = (torch.randn(RANK, K) / K**0.5, torch.randn(N, RANK)) if lora else (None, None)
    seed = torch.tensor([-(2**40) - 12345]) if dropout else None
    arguments = dict(qweight=qweight, absmax=absmax, nested=nested, lora_A=A, lora_B=B)
    arguments |= dict(scaling=1.75, dropout=dropout, seed=seed, blocksize=blocksize)
    return x, dy, arguments, torch.randn(N).to(dtype) if bias else None


def assert_refuses_as_others(kernels):
    """Bad arguments are refused in the words of the kernels in C++."""
    x, dy, arguments, bias = drawn_layer(torch.float32, 24, 256, dropout=0.1)
    cases = [
        ({"seed": None}, ValueError, "lora_linear: dropout > 0 needs a seed, got None"),
        ({"blocksize": 48}, ValueError, "lora_linear: blocksize must be a power of two"),
        ({"lora_B": None}, ValueError, "lora_linear: lora_A and lora_B must come together"),
        ({"qweight": arguments["qweight"].int()}, TypeError, "lora_linear: qweight must be uint8, got int32"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            kernels.lora_linear(x, bias=bias, **{**arguments, **change})
        S = x.new_empty(len(x), RANK)
        with pytest.raises(kind, match=message.replace("lora_linear:", "lora_linear_backward:")):
            kernels.lora_linear_backward(dy, x, S, need_dx=True, **{**arguments, **change})


def assert_makes_no_dx(kernels, dtype, N, K):
    x, dy, arguments, _ = drawn_layer(dtype, N, K)
    S = torch.ones(len(x), RANK, dtype=dtype)
    dx, dA, dB = kernels.lora_linear_backward(dy, x, S, need_dx=False, **arguments)
    assert dx.shape == (0,)
    assert (dA.shape, dB.shape) == ((RANK, K), (N, RANK))
    assert dA.any()
    assert dB.any()
