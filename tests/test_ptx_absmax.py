"""The CUDA kernels of absmax, executed without a GPU: nvcc's PTX for every architecture, launched by the code that
ships, equal to reference.py bit for bit."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from nf4lora import reference
from ptx import ARCHITECTURES, Device, Launchers, compile_ptx, find_nvcc

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


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def assert_quantizes_as_the_reference(ops: Absmax, absmax: torch.Tensor) -> None:
    absmax_q, nested = ops.quantize(absmax)
    expected_q, expected_nested = reference.absmax_quantize(absmax)
    assert_same_bits(nested, expected_nested)
    assert torch.equal(absmax_q, expected_q)


@pytest.mark.parametrize("count", [1, 2, 31, 255, 256, 257, 2048 + 1, 9 * 256 + 77])
def test_quantize_equals_the_reference(absmax_ops, count):
    assert_quantizes_as_the_reference(absmax_ops, torch.rand(count, generator=generator()))


def test_offset_is_summed_in_the_contracts_order(absmax_ops):
    # Values over 60 powers of two: any other order gives another float64 sum.
    exponents = torch.randint(-30, 30, (10 * 256 + 5,), generator=generator())
    absmax = torch.rand(len(exponents), generator=generator()) * 2.0**exponents
    assert_quantizes_as_the_reference(absmax_ops, absmax)
    other_order = sum(absmax.double().flip(0).tolist()) != sum(absmax.double().tolist())
    assert other_order


def test_ties_take_the_lower_index(absmax_ops):
    # Pairs of opposite sign make an offset of exactly zero, and 1 makes a scale of exactly one.
    code = reference.nested_code()
    midpoints = (code[1:] + code[:-1]) / 2
    values = torch.cat([midpoints[:127], -midpoints[:127], torch.tensor([1.0, -1.0])])
    assert_quantizes_as_the_reference(absmax_ops, values)
    assert torch.equal(absmax_ops.quantize(values)[0][:127], torch.arange(127, dtype=torch.uint8))


def test_equal_and_tiny_and_huge_values(absmax_ops):
    equal = torch.full((300,), 0.3)
    assert_quantizes_as_the_reference(absmax_ops, equal)
    assert_quantizes_as_the_reference(absmax_ops, torch.zeros(512))
    assert_quantizes_as_the_reference(absmax_ops, torch.rand(300, generator=generator()) * 1e-38)
    assert_quantizes_as_the_reference(absmax_ops, torch.rand(300, generator=generator()) * 3.4e38)
    halves = torch.cat([torch.zeros(256), torch.full((256,), 2.0)])  # each block is all alike, but not at the mean
    assert_quantizes_as_the_reference(absmax_ops, halves)


@pytest.mark.parametrize("count", [1, 3, 4, 255, 256, 257, 4096 + 2])
def test_dequantize_equals_the_reference(absmax_ops, count):
    absmax_q = torch.randint(256, (count,), generator=generator(), dtype=torch.uint8)
    nested = torch.rand(-(-count // 256) + 1, generator=generator())
    assert_same_bits(absmax_ops.dequantize(absmax_q, nested), reference.absmax_dequantize(absmax_q, nested))


def test_dequantize_rounds_twice(absmax_ops):
    absmax_q = torch.arange(256, dtype=torch.uint8).repeat(16)
    nested = torch.cat([torch.rand(16, generator=generator()), torch.tensor([0.0615])])
    got = absmax_ops.dequantize(absmax_q, nested)
    assert_same_bits(got, reference.absmax_dequantize(absmax_q, nested))
    products = reference.nested_code()[absmax_q.long()].double() * nested[:-1].repeat_interleave(256).double()
    fused = (products + nested[-1].double()).float()
    assert not torch.equal(got, fused)  # so the test would see a fused multiply-add


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
