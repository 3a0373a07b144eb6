"""The CUDA kernel that unpacks a rectangle of W, executed without a GPU: to the bit a part of nf4_dequantize."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4lora import ops

from support.ptx import ARCHITECTURES, Device, Launchers, PtxError, compile_ptx, find_nvcc
from support.ptx.tensors import bits

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "lora_slice.cu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Slice(ctypes.Structure):
    """As in csrc/cuda/launch.h."""

    _fields_ = [
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("qweight", "absmax", "absmax_q", "nested", "weight")),
        *((name, ctypes.c_int64) for name in ("N", "K", "n0", "rows", "k0", "columns", "blocksize", "stride")),
        *[("factor", ctypes.c_void_p), ("dtype_of_factor", ctypes.c_int), ("factor_is_below", ctypes.c_bool)],
        *[("scaling", ctypes.c_float), ("R", ctypes.c_int64)],
        *[("first_rank", ctypes.c_int64), ("all_ranks", ctypes.c_int64)],
    ]


def packed(N, K, blocksize=64, double_quant=True):
    draw = torch.Generator().manual_seed(N + K)
    qweight = torch.randint(256, (N, K // 2), generator=draw, dtype=torch.uint8)
    absmax = torch.randn(N, K // blocksize, generator=draw).abs()
    return (qweight, *(ops.absmax_quantize(absmax) if double_quant else (absmax, None)), blocksize)


def expected(W, dtype, n0, rows, k0, columns):
    qweight, absmax, nested, blocksize = W
    scales = absmax if nested is None else ops.absmax_dequantize(absmax, nested)
    return ops.nf4_dequantize(qweight, scales, blocksize, dtype)[n0 : n0 + rows, k0 : k0 + columns]


class Unpacker:
    """lora_slice on one architecture, as a function of tensors."""

    def __init__(self, architecture):
        self.device = Device(compile_ptx(SOURCE, architecture))
        self.launchers = Launchers(self.device)

    def launch(self, **arguments):
        given = {k: v.address if hasattr(v, "address") else v for k, v in arguments.items()}
        return self.launchers.lora_slice(ctypes.byref(Slice(**given)), None)

    def slice(self, W, dtype, n0, rows, k0, columns, offsets=(0, 0)):
        """The part, or what the launcher said; `offsets` in bytes put codes and output off their alignment."""
        qweight, absmax, nested, blocksize = W
        out = self.device.empty(rows * columns, bits(torch.empty(0, dtype=dtype)).dtype, offsets[1])
        scales = self.device.upload(bits(absmax))
        said = self.launch(
            dtype=DTYPES.index(dtype),
            qweight=self.device.upload(bits(qweight), offsets[0]),
            absmax=scales if nested is None else None,
            absmax_q=None if nested is None else scales,
            nested=None if nested is None else self.device.upload(bits(nested)),
            weight=out,
            **dict(N=qweight.shape[0], K=2 * qweight.shape[1], n0=n0, rows=rows, k0=k0, columns=columns),
            blocksize=blocksize,
        )
        return said if said is not None else out.numpy().reshape(rows, columns)

    def check(self, W, dtype, *rectangle, offsets=(0, 0)):
        got = self.slice(W, dtype, *rectangle, offsets=offsets)
        assert not isinstance(got, str), got
        assert (got.flatten() == bits(expected(W, dtype, *rectangle))).all()

    def extended(self, W, dtype, n0, rows, k0, columns, factor, below, scaling, gap=0, offsets=(0, 0), among=None):
        """Checks a slice with a factor around it, and that nothing else of the buffer is written.

        Rows lie `gap` values further apart than they are long; `offsets` in bytes put output and factor off alignment.
        among: the first rank of the factor, and of how many.
        """
        qweight, absmax, nested, blocksize = W
        N, K, (R, P) = qweight.shape[0], 2 * qweight.shape[1], ranks(factor, below)
        first, of_all = among or (0, 0)
        P = -(-of_all // 8) * 8 or P
        height, width = (rows + P, columns) if below else (rows, columns + P)
        out = torch.full((height + 2, width + gap), 7.0, dtype=dtype)
        there = self.device.upload(bits(out), offsets[0])
        scales = self.device.upload(bits(absmax))
        stride = width + gap
        said = self.launch(
            dtype=DTYPES.index(dtype), qweight=self.device.upload(bits(qweight)),
            absmax=scales if nested is None else None, absmax_q=None if nested is None else scales,
            nested=None if nested is None else self.device.upload(bits(nested)),
            weight=ctypes.c_void_p(there.address + dtype.itemsize * stride),
            N=N, K=K, n0=n0, rows=rows, k0=k0, columns=columns, blocksize=blocksize, stride=stride,
            factor=self.device.upload(bits(factor), offsets[1]), dtype_of_factor=DTYPES.index(factor.dtype),
            factor_is_below=below, scaling=scaling, R=R, first_rank=first, all_ranks=of_all,
        )  # fmt: skip
        if said is not None:
            return said
        body = out[1 : height + 1, :width]
        body[:rows, :columns] = expected(W, dtype, n0, rows, k0, columns)
        scaled = (factor.to(dtype).float() * scaling).to(dtype)
        if below:
            body[rows:] = 0
            body[rows : rows + R] = scaled[:, k0 : k0 + columns]
        else:
            body[:, columns:] = 0
            body[:, columns + first : columns + first + R] = scaled[n0 : n0 + rows]
        assert (there.numpy() == bits(out)).all()


def ranks(factor, below):
    R = factor.shape[0 if below else 1]
    return R, -(-R // 8) * 8


def factor_of(W, R, below, dtype=torch.float32):
    N, K = W[0].shape[0], 2 * W[0].shape[1]
    draw = torch.Generator().manual_seed(R)
    return torch.randn(*((R, K) if below else (N, R)), generator=draw).to(dtype)


@pytest.mark.parametrize("among", [(0, 24), (8, 24), (16, 24), (3, 16), (5, 40), (0, 8), (1, 9)], ids=str)
@pytest.mark.parametrize("R", [8, 4, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_is_surrounded_by_zeros_for_the_ranks_of_the_others(dtype, R, among):
    one = Unpacker(ARCHITECTURES[0])
    first, of_all = among
    if first + R > of_all:
        R = of_all - first
    W = packed(37, 192)
    for gap, of_factor in ((0, torch.float32), (3, torch.bfloat16)):
        assert (
            one.extended(W, dtype, 3, 20, 32, 96, factor_of(W, R, False, of_factor), False, 0.5, gap, among=among)
            is None
        )


def test_ranks_outside_all_ranks_are_refused():
    one = Unpacker(ARCHITECTURES[0])
    W = packed(37, 192)
    factor = factor_of(W, 4, False)
    for among in ((-1, 8), (5, 8), (0, 3)):
        said = one.extended(W, torch.bfloat16, 0, 8, 0, 64, factor, False, 0.5, among=among)
        assert said == "ranks outside all ranks"
    below = factor_of(W, 4, True)
    said = one.extended(W, torch.bfloat16, 0, 8, 0, 64, below, True, 0.5, among=(0, 8))
    assert said == "some of the ranks, below W"


@pytest.fixture(scope="module")
def one():
    return Unpacker(ARCHITECTURES[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_part_of_nf4_dequantize(architecture):
    unpacker, W = Unpacker(architecture), packed(41, 576)
    for dtype in DTYPES:
        unpacker.check(W, dtype, 3, 37, 96, 416)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_any_blocksize(one, blocksize, double_quant):
    W = packed(7, 3 * blocksize, blocksize, double_quant)
    for dtype in DTYPES:
        one.check(W, dtype, 0, 7, 0, 3 * blocksize)
        one.check(W, dtype, 2, 4, 32 if blocksize > 32 else 0, blocksize)


@pytest.mark.parametrize(
    "rectangle", [(0, 1, 0, 32), (69, 1, 288, 32), (1, 31, 32, 256), (0, 33, 0, 288), (5, 65, 64, 128)]
)
def test_ragged_rectangles(one, rectangle):
    for dtype in (torch.float32, torch.bfloat16):
        one.check(packed(70, 320, 32), dtype, *rectangle)


@pytest.mark.parametrize("off", [(1, 1), (1, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_tensors_take_the_slow_path_to_the_same_bits(one, dtype, off):
    one.check(packed(9, 128), dtype, 1, 7, 32, 96, offsets=(off[0], off[1] * dtype.itemsize))


def test_the_offset_is_found_behind_whole_blocks_of_scales(one):
    one.check(packed(8, 1024, 32), torch.float32, 0, 8, 0, 1024)  # 256 scales, one nested block to the last


def test_neighbours_of_the_part_are_not_touched(one):
    W = packed(6, 128, double_quant=False)
    out = one.device.upload(np.full(8 * 64, 7.0, np.float32))
    said = one.launch(
        dtype=0, qweight=one.device.upload(bits(W[0])), absmax=one.device.upload(bits(W[1])),
        weight=ctypes.c_void_p(out.address + 4 * 64), N=6, K=128, n0=0, rows=6, k0=64, columns=64, blocksize=64,
    )  # fmt: skip
    assert said is None
    rows = out.numpy().reshape(8, 64)
    assert (rows[[0, 7]] == 7.0).all()
    assert (rows[1:7] == expected(W, torch.float32, 0, 6, 64, 64).numpy()).all()


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_factor_surrounds_the_slice(architecture, below):
    unpacker, W = Unpacker(architecture), packed(41, 576)
    for dtype in DTYPES:
        unpacker.extended(W, dtype, 3, 37, 96, 416, factor_of(W, 16, below), below, 2.0)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("R", [1, 5, 8, 17, 64])
def test_any_rank_is_filled_up_with_zeros(one, R, below):
    W = packed(9, 320, 32)
    for dtype, of_factor in zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True):
        one.extended(W, dtype, 1, 7, 32, 96, factor_of(W, R, below, of_factor), below, 0.3)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_lie_apart_and_nothing_between_them_is_written(one, dtype, below):
    W = packed(9, 128)
    for gap in (8, 3):  # the second leaves the alignment of 16 bytes
        one.extended(W, dtype, 1, 7, 32, 96, factor_of(W, 12, below), below, 0.5, gap)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unaligned_factor_or_output_takes_the_slow_path_to_the_same_bits(one, dtype, below):
    W = packed(9, 128)
    one.extended(W, dtype, 1, 7, 32, 96, factor_of(W, 16, below, torch.float16), below, 0.5, 0, (dtype.itemsize, 0))
    one.extended(W, dtype, 1, 7, 32, 96, factor_of(W, 16, below, torch.float16), below, 0.5, 0, (0, 2))


def test_a_factor_is_rounded_before_it_is_scaled(one):
    """Between both roundings lies a difference: 1 + 2^-8 is 1 in bfloat16, and thrice that is 3; else 3 + 2^-6."""
    W = packed(1, 32, 32)
    one.extended(W, torch.bfloat16, 0, 1, 0, 32, torch.full((1, 8), 1 + 2**-8), False, 3.0)
    assert (torch.tensor(3 * (1 + 2**-8)).bfloat16() != 3.0).item()


def test_a_slice_with_its_factor_is_one_launch(one):
    W = packed(6, 128)
    one.launchers.launches.clear()
    one.extended(W, torch.bfloat16, 0, 6, 0, 128, factor_of(W, 16, False), False, 2.0)
    assert len(one.launchers.launches) == 1


def test_rows_that_would_overlap_are_refused(one):
    W = packed(8, 128)
    one.launchers.launches.clear()
    for below, gap in ((False, -1), (True, -1)):
        said = one.extended(W, torch.bfloat16, 0, 8, 0, 128, factor_of(W, 16, below), below, 2.0, gap)
        assert said == "rows that overlap"
    assert one.launchers.launches == []


def test_a_factor_one_value_short_is_noticed(one):
    W = packed(4, 128)
    for below in (False, True):
        short = one.device.upload(bits(factor_of(W, 16, below))[:-1])
        with pytest.raises(PtxError, match="out of bounds"):
            one.launch(
                dtype=1, qweight=one.device.upload(bits(W[0])), absmax_q=one.device.upload(bits(W[1])),
                nested=one.device.upload(bits(W[2])), weight=one.device.empty(20 * 144, np.uint16), N=4, K=128, n0=0,
                rows=4, k0=0, columns=128, blocksize=64, factor=short, factor_is_below=below, scaling=1.0, R=16,
            )  # fmt: skip


def test_what_is_no_part_of_W_is_refused(one):
    W = packed(8, 128)
    one.launchers.launches.clear()
    for rectangle, text in [
        ((0, 8, 16, 64), "columns off a multiple of 32"),
        ((0, 8, 0, 48), "columns off a multiple of 32"),
        ((1, 8, 0, 128), "rows outside W"),
        ((-1, 2, 0, 128), "rows outside W"),
        ((0, 8, 32, 128), "columns outside W"),
        ((0, 8, -32, 64), "columns outside W"),
    ]:
        assert one.slice(W, torch.bfloat16, *rectangle) == text
    assert one.slice(W, torch.bfloat16, 4, 0, 0, 128).size == 0
    assert one.slice(W, torch.bfloat16, 4, 2, 128, 0).size == 0
    assert one.launchers.launches == []


def test_launch_error_is_reported(one):
    one.launchers.fail_next(1)
    assert one.slice(packed(2, 64), torch.float32, 0, 2, 0, 64) == "an error of the test"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indices_are_64_bit(dtype):
    """The last row of 2^35 weights: the pointers are moved back, so that only the end of each tensor is there."""
    unpacker, K, rows, blocksize = Unpacker("80"), 4096, 2**23 + 1, 64
    N, tail = rows + 5, packed(1, 4096)
    unpacker.launchers.only_last_block = True
    columns = 1024 // dtype.itemsize // 2  # of the last block: what a warp stores at once
    qweight, absmax, nested, _ = tail
    scales = ops.absmax_dequantize(absmax, nested)
    out = unpacker.device.empty(columns, bits(torch.empty(0, dtype=dtype)).dtype)
    codes, floats = unpacker.device.upload(bits(qweight)), unpacker.device.upload(bits(scales))

    def at_end(buffer, size, there, whole):
        return (buffer.address - size * (whole - there)) & 2**64 - 1

    said = unpacker.launch(
        dtype=DTYPES.index(dtype),
        qweight=at_end(codes, 1, K // 2, N * K // 2),
        absmax=at_end(floats, 4, K // blocksize, N * K // blocksize),
        weight=at_end(out, dtype.itemsize, columns, rows * K),
        **dict(N=N, K=K, n0=5, rows=rows, k0=0, columns=K, blocksize=blocksize),
    )
    assert said is None
    assert (out.numpy() == bits(ops.nf4_dequantize(qweight, scales, blocksize, dtype))[-columns:]).all()


def test_a_buffer_one_byte_short_is_noticed(one):
    """The control of all of the above: the interpreter would see an access past the end."""
    qweight, absmax, _, _ = packed(1, 64, double_quant=False)
    arguments = dict(absmax=one.device.upload(bits(absmax)), weight=one.device.empty(64, np.float32))
    with pytest.raises(PtxError, match="out of bounds"):
        one.launch(
            dtype=0, qweight=one.device.upload(bits(qweight)[:-1]), **arguments,
            N=1, K=64, n0=0, rows=1, k0=0, columns=64, blocksize=64,
        )  # fmt: skip
