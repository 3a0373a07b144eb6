"""A LoRA layer with a batch, drawn from a seed, and how close results are held to the reference."""

import torch

from nf4lora import ops

# Against the reference, which does the same arithmetic and sums in another order. Results that are rounded to 16 bits
# may land on either neighbour, so one unit in the last place of the largest value, which is 2^-7 (2^-10) of a value
# just above a power of two; float32 sums of up to 4,608 terms differ by a few dozen units in theirs.
ULP = {torch.float32: 2**-23 * 64, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# dA and dB are never rounded to 16 bits.
FLOAT_SUM = 2**-23 * 64
# What S, y and dB sum are values of about one or more. Where there is only one result they may cancel, and it says
# nothing of the sum's rounding.
TERM = 0.5


class Case:
    """A layer and a batch, drawn from a seed."""

    def __init__(self, M=13, N=100, K=256, R=16, blocksize=64, dtype=torch.float32, double_quant=True, bias=True,
                 dropout=0.0, device="cpu", seed=0):  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(M, K, generator=draw).to(device, dtype)
        self.dy = torch.randn(M, N, generator=draw).to(device, dtype)
        self.qweight, self.absmax = ops.nf4_quantize((torch.randn(N, K, generator=draw) * 0.05).to(device), blocksize)
        self.nested = None
        if double_quant:
            self.absmax, self.nested = ops.absmax_quantize(self.absmax)
        self.bias = torch.randn(N, generator=draw).to(device, dtype) if bias else None
        self.A = (torch.randn(R, K, generator=draw) / K**0.5).to(device) if R else None
        self.B = (torch.randn(N, R, generator=draw) * 0.1).to(device) if R else None
        self.options = (2.0, dropout, torch.tensor([seed * 2**33 + 7], device=device), blocksize)

    def forward(self):
        return (self.x, self.qweight, self.absmax, self.nested, self.bias, self.A, self.B, *self.options)

    def backward(self, S):
        return (self.dy, self.x, S, self.qweight, self.absmax, self.nested, self.A, self.B, *self.options)

    def weight(self):
        absmax = self.absmax if self.nested is None else ops.absmax_dequantize(self.absmax, self.nested)
        return ops.nf4_dequantize(self.qweight, absmax, self.options[-1], self.x.dtype)


def assert_close(got, expected, tolerance, what, least=1e-6):
    """`tolerance` of the largest value expected, or of `least` where all are smaller."""
    assert got.shape == expected.shape, what
    assert got.dtype == expected.dtype, what
    if not expected.numel():
        return
    largest = expected.double().abs().max().clamp(min=least)
    worst = (got.cpu().double() - expected.cpu().double()).abs().max() / largest
    assert worst <= tolerance, f"{what}: {worst:.2e} of the largest value, allowed {tolerance:.2e}"
