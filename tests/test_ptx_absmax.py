"""The CUDA kernels of absmax, executed without a GPU: nvcc's PTX for every architecture, launched by the code that
ships, equal to reference.py bit for bit."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4lora.ops import reference

from support.absmax_claims import *  # noqa: F403  the tests that every device shares
from support.absmax_claims import assert_same_bits
from support.ptx import ARCHITECTURES, Device, Launchers, compile_ptx, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "absmax.cu"


class Absmax:
    """The launchers of absmax.cu on one architecture, as functions of tensors."""

    def __init__(self, architecture: str):
        self.device = Device(compile_ptx(SOURCE, architecture))
        self.launchers = Launchers(self.device)

    def quantize(self, absmax: torch.Tensor):
        count, blocks = absmax.numel(), -(-absmax.numel() // 256)
        absmax_q, nested = self.device.empty(count, np.uint8), self.device.empty(blocks + 1, np.float32)
        x, block_sums = self.device.upload(absmax.numpy()), self.device.empty(blocks, np.float64)
        assert self.launchers.absmax_quantize(x, absmax_q, nested, block_sums, count, None) is None
        return torch.from_numpy(absmax_q.numpy()), torch.from_numpy(nested.numpy())

    def dequantize(self, absmax_q: torch.Tensor, nested: torch.Tensor, offset: int = 0):
        out = self.device.empty(absmax_q.numel(), np.float32, offset)
        codes, scales = self.device.upload(absmax_q.numpy(), offset), self.device.upload(nested.numpy())
        assert self.launchers.absmax_dequantize(codes, scales, out, absmax_q.numel(), None) is None
        return torch.from_numpy(out.numpy())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def absmax_ops(request):
    return Absmax(request.param)


def test_unaligned_tensors_take_the_slow_path_to_the_same_bits(absmax_ops):
    absmax_q, nested = torch.arange(256, dtype=torch.uint8), torch.tensor([0.5, 0.25])
    assert_same_bits(absmax_ops.dequantize(absmax_q, nested, offset=4), absmax_ops.dequantize(absmax_q, nested))


def test_empty_absmax_has_an_offset_of_zero():
    ops = Absmax("80")
    absmax_q, nested = ops.quantize(torch.empty(0))
    assert (absmax_q.numel(), nested.tolist()) == (0, [0.0])
    assert ops.dequantize(absmax_q, nested).numel() == 0
    assert ops.launchers.launches == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_offset_tells_of_absmax_that_is_not_finite(bad):
    absmax = torch.ones(700)
    absmax[300] = bad
    assert not torch.isfinite(Absmax("80").quantize(absmax)[1][-1])


def test_nested_tells_of_absmax_too_far_apart():
    absmax = torch.full((700,), -3.4e38)
    absmax[300:400] = 3.4e38
    nested = Absmax("80").quantize(absmax)[1]
    assert torch.isfinite(nested[-1])
    assert torch.isinf(nested[:-1]).tolist() == [False, True, False]


def test_indices_are_64_bit():
    """The last block of 2^34 values: the pointers are moved back, so that only the end of each tensor is there."""
    ops, count, tail = Absmax("80"), 2**34 + 512, 512
    ops.launchers.only_last_block = True
    absmax_q = torch.arange(256, dtype=torch.uint8).repeat(2)
    nested = torch.tensor([0.5, 0.25, 0.125])

    def at_end(buffer, size_of_rest):
        return ctypes.c_uint64(buffer.address - size_of_rest & 2**64 - 1)

    codes, scales = ops.device.upload(absmax_q.numpy()), ops.device.upload(nested.numpy())
    out = ops.device.empty(tail, np.float32)
    q, a, n = at_end(codes, count - tail), at_end(out, 4 * (count - tail)), at_end(scales, 4 * (count - tail) // 256)
    assert ops.launchers.absmax_dequantize(q, n, a, count, None) is None
    assert_same_bits(torch.from_numpy(out.numpy()), reference.absmax_dequantize(absmax_q, nested))
