"""lora_linear's CUDA kernel on tensor cores, forward and dx, executed without a GPU and held against reference.py."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4lora import ops
from nf4lora.ops import reference

from support.bits import assert_same_bits
from support.ptx import ARCHITECTURES, Device, Launchers, PtxError, compile_ptx, find_nvcc
from support.ptx.tensors import bits

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "lora_gemm.cu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place of a value just above a power of two.
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


class LoraGemm(ctypes.Structure):
    """As in csrc/cuda/launch.h."""

    _fields_ = [
        *[("dtype", ctypes.c_int), ("backward", ctypes.c_bool)],
        *((name, ctypes.c_void_p) for name in ("rows", "qweight", "absmax", "absmax_q", "nested", "bias")),
        *[("low_rank", ctypes.c_void_p), ("factor", ctypes.c_void_p), ("dtype_of_factor", ctypes.c_int)],
        *[("seed", ctypes.c_void_p), ("threshold", ctypes.c_uint32), ("scaling", ctypes.c_float)],
        *[("out", ctypes.c_void_p), ("partials", ctypes.c_void_p)],
        *((name, ctypes.c_int64) for name in ("M", "N", "K", "R", "blocksize")),
    ]


class Case:
    """Random arguments of the product in one direction: rows is x forward, dy backward."""

    def __init__(
        self, M, N, K, R=0, backward=False, dtype=torch.bfloat16, blocksize=64, double_quant=True, bias=False,
        dropout=0.0, factor_dtype=torch.float32,
    ):  # fmt: skip
        draw = torch.Generator().manual_seed(0)
        depth, outputs = (N, K) if backward else (K, N)
        self.rows = torch.randn(M, depth, generator=draw).to(dtype)
        self.qweight, self.absmax = ops.nf4_quantize(torch.randn(N, K, generator=draw) / depth**0.5, blocksize)
        self.nested = None
        if double_quant:
            self.absmax, self.nested = ops.absmax_quantize(self.absmax)
        self.bias = torch.randn(N, generator=draw) if bias else None
        self.low_rank = torch.randn(M, R, generator=draw).to(dtype) if R else None
        shape = (R, K) if backward else (N, R)
        self.factor = torch.randn(shape, generator=draw).to(factor_dtype) if R else None
        self.scaling, self.dropout, self.blocksize, self.backward = 0.75, dropout, blocksize, backward
        self.seed = torch.tensor([-(2**40) - 12345]) if dropout else None
        self.shape, self.outputs = (M, N, K, R), outputs

    def weight(self):
        absmax = self.absmax if self.nested is None else ops.absmax_dequantize(self.absmax, self.nested)
        return ops.nf4_dequantize(self.qweight, absmax, self.blocksize, self.rows.dtype)

    def expected(self):
        """In float64."""
        M, _, K, R = self.shape
        W = self.weight().double()
        out = self.rows.double() @ (W if self.backward else W.T)
        if R:
            factor = self.factor.to(self.rows.dtype).double()
            low_rank = self.scaling * (self.low_rank.double() @ (factor if self.backward else factor.T))
            if self.dropout:
                low_rank *= reference.dropout_mask(M, K, self.dropout, self.seed)
            out += low_rank
        return out if self.bias is None else out + self.bias.double()


class Gemm:
    def __init__(self, architecture):
        self.device = Device(compile_ptx(SOURCE, architecture), size=1 << 24)
        self.launchers = Launchers(self.device)

    def arguments(self, case: Case, offset: int = 0):
        """The struct, and the buffer of the result."""
        M, N, K, R = case.shape

        def address(tensor, off=0):
            return None if tensor is None else self.device.upload(bits(tensor), off).address

        out = self.device.empty(M * case.outputs, np.uint16)
        gemm = LoraGemm(
            dtype=DTYPES.index(case.rows.dtype), backward=case.backward, rows=address(case.rows, offset),
            qweight=address(case.qweight), absmax=address(case.absmax if case.nested is None else None),
            absmax_q=address(None if case.nested is None else case.absmax), nested=address(case.nested),
            bias=address(case.bias), low_rank=address(case.low_rank), factor=address(case.factor),
            dtype_of_factor=DTYPES.index(case.factor.dtype) if R else 0, seed=address(case.seed),
            threshold=min(int(case.dropout * 2**32 + 0.5), 2**32 - 1), scaling=case.scaling, out=out.address,
            M=M, N=N, K=K, R=R, blocksize=case.blocksize,
        )  # fmt: skip
        values = self.launchers.lora_gemm_partials(ctypes.pointer(gemm), result=ctypes.c_int64)
        if values:
            gemm.partials = self.device.empty(values, np.float32).address
        return gemm, out

    def __call__(self, case: Case):
        gemm, out = self.arguments(case)
        self.launchers.launches.clear()
        assert self.launchers.lora_gemm(ctypes.pointer(gemm), None) is None
        return torch.from_numpy(out.numpy()).view(case.rows.dtype).reshape(len(case.rows), case.outputs)

    def check(self, case: Case):
        # Half a unit for the one rounding; 1e-5 for float32 sums of values that are a few units large.
        ulp = ULP[case.rows.dtype]
        torch.testing.assert_close(self(case).double(), case.expected(), rtol=ulp / 2, atol=1e-5)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def gemm(request):
    return Gemm(request.param)


@pytest.fixture(scope="module")
def one():
    return Gemm(ARCHITECTURES[0])


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def backward(request):
    return request.param


def test_equals_the_reference(gemm, backward):
    gemm.check(Case(M=19, N=136, K=96, R=5, backward=backward, blocksize=32, bias=not backward, dropout=0.3 * backward))


@pytest.mark.parametrize("M", [1, 33, 64, 65, 130])
def test_any_rows(one, backward, M):
    one.check(Case(M=M, N=72, K=160, R=16, backward=backward, blocksize=32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [5, 40, 70])
def test_every_kernel_of_either_dtype(one, backward, dtype, M):
    one.check(Case(M=M, N=24, K=128, R=2, backward=backward, dtype=dtype, double_quant=False))


def test_ragged_outputs(one):
    for N in (1, 37, 127, 131):
        one.check(Case(M=4, N=N, K=64, R=1, bias=True))


@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_any_blocksize(one, backward, blocksize):
    for double_quant in (False, True):
        one.check(Case(M=3, N=16, K=3 * blocksize, backward=backward, blocksize=blocksize, double_quant=double_quant))


@pytest.mark.parametrize("R", [15, 16, 17, 64, 70])
def test_any_rank(one, backward, R):
    one.check(Case(M=9, N=40, K=64, R=R, backward=backward))


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_of_any_dtype_are_rounded_once(one, backward, factor_dtype):
    one.check(Case(M=9, N=40, K=64, R=8, backward=backward, factor_dtype=factor_dtype))


@pytest.mark.parametrize("M", [8, 70])
def test_dropout_is_that_of_the_reference(one, M):
    one.check(Case(M=M, N=16, K=192, R=8, backward=True, dropout=0.5))


def test_the_summed_index_is_split_where_that_fills_the_card(one, backward):
    deep = dict(N=1048, K=64) if backward else dict(N=24, K=1088)
    case = Case(M=6, R=4, backward=backward, bias=not backward, **deep)
    one.check(case)
    assert len(one.launchers.launches) == 2
    assert "sum" in one.launchers.launches[1]


def test_weights_are_exactly_those_of_dequantize(one, backward):
    # A row of the identity picks a row or a column of W: nothing is summed.
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(M=40, N=64, K=128, backward=backward, dtype=dtype)
        case.rows = torch.eye(len(case.rows[0]), dtype=dtype)[8:48]
        W = case.weight()
        assert_same_bits(one(case), W[8:48] if backward else W.T[8:48])


def test_a_token_does_not_see_the_others(one, backward):
    case = Case(M=20, N=32, K=128, R=4, backward=backward)
    whole = one(case)
    case.rows[1:] = float("nan")
    out = one(case)
    assert_same_bits(out[0], whole[0])
    assert out[1:].isnan().all()


@pytest.mark.parametrize("late", [True, False], ids=["late_copies", "early_copies"])
def test_copies_may_arrive_at_any_time(one, backward, late):
    one.device.late_copies = late
    try:
        one.check(Case(M=20, N=512, K=512, R=4, backward=backward))
    finally:
        one.device.late_copies = True


def test_no_rows_launch_nothing(one, backward):
    case = Case(M=1, N=16, K=64, backward=backward)
    arguments, _ = one.arguments(case)
    arguments.M = 0
    one.launchers.launches.clear()
    assert one.launchers.lora_gemm(ctypes.pointer(arguments), None) is None
    assert one.launchers.launches == []


@pytest.mark.parametrize(
    ("case", "offset", "why"),
    [
        (dict(N=16, dtype=torch.float32), 0, "float32, which the kernel for tensor cores does not take"),
        (dict(N=16), 2, "rows or qweight off a multiple of 16 bytes"),
        (dict(N=17, backward=True), 0, "out features that are no multiple of 8, backwards"),
    ],
)
def test_what_it_cannot_take_is_refused_before_a_launch(one, case, offset, why):
    arguments, out = one.arguments(Case(M=2, K=64, **case), offset)
    one.launchers.launches.clear()
    assert one.launchers.lora_gemm(ctypes.pointer(arguments), None) == why
    assert one.launchers.launches == []
    assert out.untouched()


def test_too_short_a_weight_is_out_of_bounds(one, backward):
    case = Case(M=1, N=16, K=128, backward=backward)
    arguments, _ = one.arguments(case)
    arguments.qweight = one.device.upload(bits(case.qweight[:-1])).address
    with pytest.raises(PtxError, match="out of bounds"):
        one.launchers.lora_gemm(ctypes.pointer(arguments), None)
