"""The CUDA kernels of nf4, executed without a GPU: nvcc's PTX for every architecture, launched by the code that ships,
equal to reference.py bit for bit."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4lora.ops import reference

from support.bits import assert_same_bits
from support.ptx import ARCHITECTURES, Device, Launchers, PtxError, compile_ptx, find_nvcc
from support.ptx.tensors import bits

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "nf4.cu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
NO_BLOCK = 2**64 - 1


class Nf4:
    """The launchers of nf4.cu on one architecture, as functions of tensors."""

    def __init__(self, architecture: str):
        self.device = Device(compile_ptx(SOURCE, architecture))
        self.launchers = Launchers(self.device)

    def upload(self, tensor: torch.Tensor, offset: int = 0):
        return self.device.upload(bits(tensor), offset)

    def quantize(self, weight, blocksize, offset: int = 0):
        """qweight, absmax and the first bad block; `offset` bytes put the weight off its alignment."""
        count = weight.numel()
        qweight = self.device.empty(count // 2, np.uint8, offset)
        absmax, first_bad = self.device.empty(count // blocksize, np.float32), self.device.empty(1, np.uint64)
        x, dtype = self.upload(weight, offset), DTYPES.index(weight.dtype)
        assert self.launchers.nf4_quantize(x, dtype, qweight, absmax, first_bad, count, blocksize, None) is None
        return torch.from_numpy(qweight.numpy()), torch.from_numpy(absmax.numpy()), int(first_bad.numpy()[0])

    def dequantize(self, qweight, absmax, blocksize, dtype, offset: int = 0):
        count = 2 * qweight.numel()
        out = self.device.empty(count, bits(torch.empty(0, dtype=dtype)).dtype, offset)
        codes, scales = self.upload(qweight, offset), self.upload(absmax)
        said = self.launchers.nf4_dequantize(codes, scales, out, DTYPES.index(dtype), count, blocksize, None)
        assert said is None
        return torch.from_numpy(out.numpy()).view(dtype)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def nf4(request):
    return Nf4(request.param)


def hard_weight(blocksize: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, K]: random values, a block of zeros, ties between codes, negative zeros, the ends of the dtype's range."""
    generator = torch.Generator().manual_seed(blocksize)
    weight = torch.randn(3 if blocksize < 512 else 1, 7 * blocksize, generator=generator)
    blocks = weight.reshape(-1, blocksize)
    blocks[1] = 0.0
    blocks[2] = -0.0
    midpoints = (reference.CODE[1:] + reference.CODE[:-1]) / 2
    blocks[3, :16] = torch.cat([midpoints, torch.ones(1)])
    blocks[3, 16:32] = torch.cat([-midpoints, -torch.ones(1)])
    blocks[4] *= 1e-39  # absmax below the smallest normal float32, and below the 1e-38 that guards the division
    blocks[5] *= 1e38 / blocks[5].abs().max() * 3.3
    blocks[6] = 1e-45
    limit = torch.finfo(dtype).max
    return weight.clamp(-limit, limit).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_equals_the_reference(nf4, dtype):
    for blocksize in BLOCKSIZES:
        weight = hard_weight(blocksize, dtype)
        qweight, absmax, first_bad = nf4.quantize(weight, blocksize)
        expected_qweight, expected_absmax = reference.nf4_quantize(weight, blocksize)
        assert_same_bits(qweight, expected_qweight.flatten(), blocksize)
        assert_same_bits(absmax.view(torch.int32), expected_absmax.flatten().view(torch.int32), blocksize)
        assert first_bad == NO_BLOCK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_equals_the_reference(nf4, dtype):
    for blocksize in BLOCKSIZES:
        generator = torch.Generator().manual_seed(blocksize)
        N = 15 if blocksize < 512 else 3
        qweight = torch.randint(256, (N, 3 * blocksize // 2), generator=generator, dtype=torch.uint8)
        absmax = torch.randn(N, 3, generator=generator).abs()
        absmax.view(-1)[:5] = torch.tensor([0.0, 1e-40, 1e-7, 7e4, 3.4e38])  # 7e4 is beyond float16
        weight = nf4.dequantize(qweight, absmax, blocksize, dtype)
        expected = reference.nf4_dequantize(qweight, absmax, blocksize, dtype).flatten()
        assert (bits(weight) == bits(expected)).all(), blocksize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_tensors_take_the_slow_path_to_the_same_bits(nf4, dtype):
    weight = hard_weight(64, dtype)
    offset = dtype.itemsize
    qweight, absmax, _ = nf4.quantize(weight, 64, offset)
    assert_same_bits(qweight, nf4.quantize(weight, 64)[0])
    restored = nf4.dequantize(qweight, absmax, 64, dtype, offset)
    assert (bits(restored) == bits(nf4.dequantize(qweight, absmax, 64, dtype))).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
def test_lowest_block_that_is_not_finite_is_named(bad, blocksize):
    nf4 = Nf4("80")
    for dtype in DTYPES:
        weight = torch.ones(9, blocksize, dtype=dtype)
        weight[7, 0] = weight[5, blocksize - 1] = weight[3, blocksize // 2] = bad
        assert nf4.quantize(weight, blocksize)[2] == 3


def test_empty_weight_launches_nothing():
    nf4 = Nf4("80")
    qweight, absmax, first_bad = nf4.quantize(torch.empty(0), 64)
    assert (qweight.numel(), absmax.numel(), first_bad) == (0, 0, NO_BLOCK)
    assert nf4.dequantize(qweight, absmax, 64, torch.bfloat16).numel() == 0
    assert nf4.launchers.launches == []


def test_flag_reaches_the_host():
    nf4 = Nf4("80")
    flag, value = nf4.device.upload(np.array([77], np.uint64)), ctypes.c_uint64()
    assert nf4.launchers.read(ctypes.byref(value), flag, 8, None) is None
    assert value.value == 77


def test_launch_error_is_reported():
    nf4 = Nf4("80")
    qweight, absmax = (nf4.device.upload(a) for a in (np.zeros(32, np.uint8), np.ones(1, np.float32)))
    nf4.launchers.fail_next(1)
    out = nf4.device.empty(64, np.float32)
    assert nf4.launchers.nf4_dequantize(qweight, absmax, out, 0, 64, 64, None) == "an error of the test"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indices_are_64_bit(dtype):
    """The last block of 2^35 weights: the pointers are moved back, so that only the end of each tensor is there."""
    nf4, blocksize, count, tail = Nf4("80"), 64, 2**35 + 4096, 4096
    nf4.launchers.only_last_block = True

    def at_end(buffer, size):
        return ctypes.c_uint64((buffer.address - size * (count - tail) // tail) & 2**64 - 1)

    weight = torch.randn(tail, generator=torch.Generator().manual_seed(0)).to(dtype)
    qweight, absmax = nf4.device.empty(tail // 2, np.uint8), nf4.device.empty(tail // blocksize, np.float32)
    first_bad, size = nf4.device.empty(1, np.uint64), tail * weight.element_size()
    pointers = at_end(nf4.upload(weight), size), at_end(qweight, tail // 2), at_end(absmax, 4 * tail // blocksize)
    x, q, a = pointers
    assert nf4.launchers.nf4_quantize(x, DTYPES.index(dtype), q, a, first_bad, count, blocksize, None) is None
    expected = reference.nf4_quantize(weight, blocksize)
    assert_same_bits(torch.from_numpy(qweight.numpy()), expected[0])
    assert_same_bits(torch.from_numpy(absmax.numpy()), expected[1])

    restored = nf4.device.empty(tail, bits(weight).dtype)
    out = at_end(restored, size)
    assert nf4.launchers.nf4_dequantize(q, a, out, DTYPES.index(dtype), count, blocksize, None) is None
    assert (restored.numpy() == bits(reference.nf4_dequantize(*expected, blocksize, dtype))).all()


def test_a_buffer_one_byte_short_is_noticed():
    """The control of all of the above: the interpreter would see an access past the end."""
    nf4 = Nf4("80")
    qweight, absmax = (nf4.device.upload(a) for a in (np.zeros(31, np.uint8), np.ones(1, np.float32)))
    out = nf4.device.empty(64, np.float32)
    with pytest.raises(PtxError, match="out of bounds"):
        nf4.launchers.nf4_dequantize(qweight, absmax, out, 0, 64, 64, None)
