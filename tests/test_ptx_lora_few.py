"""lora_linear's CUDA kernels for a few rows, executed without a GPU and held against reference.py."""

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

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "lora_few.cu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place of a value just above a power of two.
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


class FewRows(ctypes.Structure):
    """As in csrc/cuda/launch.h."""

    _fields_ = [
        *[("dtype", ctypes.c_int), *((name, ctypes.c_void_p) for name in ("x", "qweight", "absmax", "absmax_q"))],
        *((name, ctypes.c_void_p) for name in ("nested", "bias", "lora_A", "lora_B")),
        *[("dtype_of_A", ctypes.c_int), ("dtype_of_B", ctypes.c_int), ("seed", ctypes.c_void_p)],
        *[("threshold", ctypes.c_uint32), ("inverse_keep", ctypes.c_float), ("scaling", ctypes.c_float)],
        *[("S", ctypes.c_void_p), ("y", ctypes.c_void_p)],
        *((name, ctypes.c_int64) for name in ("M", "N", "K", "R", "blocksize")),
    ]


class Case:
    """Random arguments of lora_linear."""

    def __init__(
        self, M, N, K, R=0, dtype=torch.bfloat16, blocksize=64, double_quant=True, bias=False, dropout=0.0,
        lora_dtypes=(torch.float32, torch.float32), seed=0,
    ):  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(M, K, generator=draw).to(dtype)
        self.qweight, self.absmax = ops.nf4_quantize(torch.randn(N, K, generator=draw) / K**0.5, blocksize)
        self.nested = None
        if double_quant:
            self.absmax, self.nested = ops.absmax_quantize(self.absmax)
        self.bias = torch.randn(N, generator=draw) if bias else None
        self.A = (torch.randn(R, K, generator=draw) / K**0.5).to(lora_dtypes[0]) if R else None
        self.B = torch.randn(N, R, generator=draw).to(lora_dtypes[1]) if R else None
        self.scaling, self.dropout, self.blocksize = 1.75, dropout, blocksize
        self.seed = torch.tensor([-(2**40) - 12345]) if dropout else None

    def expected_S(self):
        return reference.lora_linear(
            self.x, self.qweight, self.absmax, self.nested, self.bias, self.A, self.B, self.scaling, self.dropout,
            self.seed, self.blocksize,
        )[1]  # fmt: skip

    def weight(self):
        absmax = self.absmax if self.nested is None else ops.absmax_dequantize(self.absmax, self.nested)
        return ops.nf4_dequantize(self.qweight, absmax, self.blocksize, self.x.dtype)

    def expected_y(self, S):
        """In float64, from an S that is given: one that lies on a neighbour is no fault of y's."""
        y = self.x.double() @ self.weight().double().T
        if self.B is not None:
            y += self.scaling * (S.double() @ self.B.to(self.x.dtype).double().T)
        return y if self.bias is None else y + self.bias.double()


class Few:
    def __init__(self, architecture):
        self.device = Device(compile_ptx(SOURCE, architecture))
        self.launchers = Launchers(self.device)

    def arguments(self, case: Case, offset: int = 0):
        """The struct, and the buffers of S and y."""
        (M, K), N, R = case.x.shape, len(case.qweight), 0 if case.A is None else len(case.A)

        def address(tensor, off=0):
            return None if tensor is None else self.device.upload(bits(tensor), off).address

        S, y = (self.device.empty(M * columns, np.uint16) for columns in (R, N))
        few = FewRows(
            dtype=DTYPES.index(case.x.dtype), x=address(case.x, offset), qweight=address(case.qweight),
            absmax=address(case.absmax if case.nested is None else None),
            absmax_q=address(None if case.nested is None else case.absmax), nested=address(case.nested),
            bias=address(case.bias), lora_A=address(case.A), lora_B=address(case.B),
            dtype_of_A=0 if case.A is None else DTYPES.index(case.A.dtype),
            dtype_of_B=0 if case.B is None else DTYPES.index(case.B.dtype),
            seed=address(case.seed), threshold=min(int(case.dropout * 2**32 + 0.5), 2**32 - 1),
            inverse_keep=1 / (1 - case.dropout), scaling=case.scaling, S=S.address, y=y.address,
            M=M, N=N, K=K, R=R, blocksize=case.blocksize,
        )  # fmt: skip
        return few, S, y

    def __call__(self, case: Case):
        few, S, y = self.arguments(case)
        assert self.launchers.lora_few(ctypes.pointer(few), None) is None
        shapes = (S, (len(case.x), few.R)), (y, (len(case.x), few.N))
        S, y = (torch.from_numpy(b.numpy()).view(case.x.dtype).reshape(shape) for b, shape in shapes)
        return y, S

    def check(self, case: Case):
        y, S = self(case)
        ulp = ULP[case.x.dtype]
        # S: float32 sums in another order, then one rounding, which may fall to the neighbour.
        torch.testing.assert_close(S, case.expected_S(), rtol=ulp, atol=1e-6)
        # y: half a unit for its one rounding; 2^-20 of the values that are summed, which are a few units large.
        torch.testing.assert_close(y.double(), case.expected_y(S), rtol=ulp / 2, atol=1e-5)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def few(request):
    return Few(request.param)


@pytest.fixture(scope="module")
def one():
    return Few(ARCHITECTURES[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference(few, dtype):
    few.check(Case(M=3, N=37, K=192, R=5, dtype=dtype, bias=True, dropout=0.3))
    few.check(Case(M=11, N=16, K=2176, R=16, dtype=dtype, double_quant=False))


@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16])
def test_any_few_rows(one, M):
    one.check(Case(M=M, N=21, K=320, R=8))


@pytest.mark.slow
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_any_blocksize_and_ragged_columns(one, blocksize):
    for double_quant in (False, True):
        for K in (blocksize, 3 * blocksize):
            one.check(Case(M=2, N=19, K=K, R=3, blocksize=blocksize, double_quant=double_quant))


def test_blocks_take_several_groups_of_rows(one):
    # Two multiprocessors of the test's device, four blocks each: the ninth group of 16 comes in a second turn.
    one.check(Case(M=2, N=9 * 16 + 3, K=128, R=2, bias=True))


@pytest.mark.parametrize("lora_dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_adapters_of_any_dtype_are_rounded_once(one, lora_dtypes):
    one.check(Case(M=5, N=16, K=128, R=20, lora_dtypes=lora_dtypes))


def test_weights_are_exactly_those_of_dequantize(one):
    # A row of the identity picks a column of W: nothing is summed, so that the bits must be those of the 16-bit weight.
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(M=16, N=33, K=128, dtype=dtype)
        case.x = torch.eye(128, dtype=dtype)[40:56]
        y, _ = one(case)
        assert_same_bits(y, case.weight().T[40:56])


def test_a_token_does_not_see_the_others(one):
    case = Case(M=6, N=20, K=256, R=4)
    whole, _ = one(case)
    case.x[1:] = float("nan")
    y, S = one(case)
    assert_same_bits(y[0], whole[0])
    assert not S[0].isnan().any()
    assert y[1:].isnan().all()


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_y_starts_beside_S_from_hopper_on(architecture, monkeypatch):
    few, seen = Few(architecture), []
    run = few.device.run
    monkeypatch.setattr(few.device, "run", lambda *given: (seen.append(given[-1].early), run(*given)))
    few.check(Case(M=2, N=16, K=64, R=2))
    few.check(Case(M=2, N=16, K=64))
    assert seen == [False, architecture == "90a", False]  # S, y; and y where there is no S to wait for


def test_no_rows_launch_nothing(one):
    one.launchers.launches.clear()
    case = Case(M=1, N=16, K=64)
    case.x = case.x[:0]
    arguments, _, _ = one.arguments(case)
    assert one.launchers.lora_few(ctypes.pointer(arguments), None) is None
    assert one.launchers.launches == []


@pytest.mark.parametrize(
    ("case", "offset", "why"),
    [
        (dict(M=17), 0, "more rows than the kernel for a few takes"),
        (dict(M=2, dtype=torch.float32), 0, "float32, which the kernel for a few rows does not take"),
        (dict(M=2), 2, "x or qweight off a multiple of 16 bytes"),
    ],
)
def test_what_it_cannot_take_is_refused_before_a_launch(one, case, offset, why):
    arguments, _, y = one.arguments(Case(N=16, K=64, **case), offset)
    one.launchers.launches.clear()
    assert one.launchers.lora_few(ctypes.pointer(arguments), None) == why
    assert one.launchers.launches == []
    assert y.untouched()


def test_too_short_a_weight_is_out_of_bounds(one):
    case = Case(M=1, N=16, K=128)
    arguments, _, _ = one.arguments(case)
    arguments.qweight = one.device.upload(bits(case.qweight[:-1])).address
    with pytest.raises(PtxError, match="out of bounds"):
        one.launchers.lora_few(ctypes.pointer(arguments), None)
