"""The tall and skinny products of LoRA on CUDA, executed without a GPU and held against float64."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4lora.ops import reference
from nf4lora.ops.kernels import unfused

from support.bits import assert_same_bits
from support.ptx import ARCHITECTURES, Device, Launchers, compile_ptx, find_nvcc
from support.ptx.grid import Launch
from support.ptx.tensors import bits

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "lora_grad.cu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place of a value just above a power of two; of float32 what its sums add.
HALF_ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class TallSkinny(ctypes.Structure):
    """As in csrc/cuda/launch.h."""

    _fields_ = [
        *[("dtype", ctypes.c_int), ("Z", ctypes.c_void_p), ("F", ctypes.c_void_p), ("dtype_of_F", ctypes.c_int)],
        *[("F_is_transposed", ctypes.c_bool), ("L", ctypes.c_void_p), ("seed", ctypes.c_void_p)],
        *[("threshold", ctypes.c_uint32), ("inner_scale", ctypes.c_float), ("outer_scale", ctypes.c_float)],
        *[("P", ctypes.c_void_p), ("G", ctypes.c_void_p), ("dtype_of_G", ctypes.c_int)],
        *[("G_is_transposed", ctypes.c_bool), ("workspace", ctypes.c_void_p)],
        *((name, ctypes.c_int64) for name in ("M", "D", "R", "most_inner")),
    ]


class Grad:
    def __init__(self, architecture=ARCHITECTURES[0], late_copies=True):
        self.device = Device(compile_ptx(SOURCE, architecture))
        self.device.late_copies = late_copies
        self.launchers = Launchers(self.device)

    def run(
        self,
        M,
        D,
        R,
        dtype=torch.bfloat16,
        which="both",
        dropout=0.0,
        F=(0, False),
        G=(0, False),
        offset=0,
        most_inner=64 << 20,
    ):
        """Checks a product against float64 and returns what was written."""
        draw = torch.Generator().manual_seed(M + D + R)
        Z, L = (torch.randn(M, columns, generator=draw).to(dtype) for columns in (D, R))
        factor = (torch.randn(D, R, generator=draw) / max(D, 1) ** 0.5).to(DTYPES[F[0]])
        seed = torch.tensor([-(2**40) - 12345])
        inner, outer = which != "outer", which != "inner"
        upload = lambda tensor, off=0: self.device.upload(bits(tensor), off).address  # noqa: E731
        as_numpy = [np.float32, np.uint16, np.uint16]
        P = self.device.empty(M * R, np.uint16)
        g = self.device.empty(D * R, as_numpy[G[0]])
        arguments = TallSkinny(
            dtype=DTYPES.index(dtype), Z=upload(Z, offset), F=upload(factor.T if F[1] else factor), dtype_of_F=F[0],
            F_is_transposed=F[1], L=upload(L), seed=upload(seed) if dropout else None,
            threshold=int(dropout * 2**32 + 0.5), inner_scale=1.25, outer_scale=0.5, P=P.address if inner else None,
            G=g.address if outer else None, dtype_of_G=G[0], G_is_transposed=G[1],
            M=M, D=D, R=R, most_inner=most_inner,
        )  # fmt: skip
        floats = self.launchers.tall_skinny_workspace(ctypes.pointer(arguments), result=ctypes.c_int64)
        arguments.workspace = self.device.empty(floats, np.float32).address
        said = self.launchers.tall_skinny(ctypes.pointer(arguments), None)
        if said:
            return said
        z = Z.double() * (reference.dropout_mask(M, D, dropout, seed) if dropout else 1)
        out = []
        # float32 sums in some order, 2^-18 of values of a few dozen at most, then one rounding.
        if inner:
            out.append(torch.from_numpy(P.numpy()).view(dtype).reshape(M, R))
            expected = 1.25 * (z @ factor.to(dtype).double())
            torch.testing.assert_close(out[-1].double(), expected, rtol=HALF_ULP[dtype], atol=1e-5)
        if outer:
            out.append(torch.from_numpy(g.numpy()).view(DTYPES[G[0]]).reshape((R, D) if G[1] else (D, R)))
            expected = 0.5 * (z.T @ L.double())
            expected = expected.T if G[1] else expected
            torch.testing.assert_close(out[-1].double(), expected, rtol=HALF_ULP[DTYPES[G[0]]], atol=1e-4)
        return out


@pytest.mark.slow
@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_float64_on_every_architecture(architecture, late_copies):
    Grad(architecture, late_copies).run(85, 72, 3, dropout=0.3)


@pytest.mark.parametrize(
    "case",
    [
        dict(M=37, D=576, R=16, dtype=torch.float16, which="inner", F=(1, True), dropout=0.1),
        dict(M=300, D=72, R=20, which="outer", G=(2, True), dropout=0.1),
        dict(M=37, D=1096, R=40, F=(2, False), G=(1, False)),
        dict(M=300, D=72, R=16, dtype=torch.float16, F=(0, True), G=(0, True)),
    ],
    ids=str,
)
def test_any_shape_layout_and_dtype(case):
    Grad().run(**case)


@pytest.mark.parametrize("which", ["inner", "outer", "both"])
@pytest.mark.parametrize("R", [9, 72])  # two tiles of eight, a rest; four of them thrice, a rest
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_instantiation(dtype, R, which):
    Grad().run(37, 264, R, dtype, which, dropout=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_repeats_bit_for_bit_alone_and_together(dropout):
    shape = (300, 264, 5)  # two parts of either product
    P, G = Grad().run(*shape, dropout=dropout)
    again = Grad().run(*shape, dropout=dropout)
    (alone_P,), (alone_G,) = (Grad().run(*shape, which=which, dropout=dropout) for which in ("inner", "outer"))
    assert_same_bits(P, again[0])
    assert_same_bits(G, again[1])
    assert_same_bits(P, alone_P)
    assert_same_bits(G, alone_G)


def test_without_rows_the_gradient_is_zero():
    assert not Grad().run(0, 72, 3)[1].any()


def test_without_columns_the_product_is_zero():
    grad = Grad()
    assert not grad.run(3, 0, 3)[0].any()
    assert len(grad.launchers.launches) == 1  # the sum of no parts; no grid of zero blocks, which is an error


@pytest.mark.parametrize(("shape", "which"), [((3, 72, 0), "both"), ((0, 72, 3), "inner"), ((3, 0, 3), "outer")])
def test_nothing_is_launched_for_nothing(shape, which):
    grad = Grad()
    assert all(product.numel() == 0 for product in grad.run(*shape, which=which))
    assert grad.launchers.launches == []


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (dict(dtype=torch.float32), "float32, which the kernel for tall and skinny products does not take"),
        (dict(D=36), "a number of columns that is no multiple of 8"),
        (dict(offset=2), "Z off a multiple of 16 bytes"),
    ],
)
def test_what_it_cannot_take_is_refused_before_a_launch(case, why):
    grad = Grad()
    assert grad.run(**(dict(M=3, D=72, R=3) | case)) == why
    assert grad.launchers.launches == []


@pytest.mark.parametrize("R", [16, 64, 256])
@pytest.mark.parametrize("D", [576, 4096, 14336])
def test_work_space_is_small_for_any_number_of_rows(D, R):
    launchers = Grad().launchers
    for M in (1, 2048, 32768, 2**20, 2**24):
        products = TallSkinny(dtype=1, P=16, G=16, M=M, D=D, R=R, most_inner=64 << 20)
        space = 4 * launchers.tall_skinny_workspace(ctypes.pointer(products), result=ctypes.c_int64)
        strip = 4 * -(-D // 256) * R * max(256, -(-M // 512) * 16)
        assert space <= max(64 << 20, strip) + 32 * 4 * D * R


@pytest.mark.parametrize("which", ["inner", "both"])
def test_little_work_space_takes_several_launches(which):
    M, D, R = 3 * 256 + 40, 264, 5
    at_once, in_turn = Grad(), Grad()
    whole = at_once.run(M, D, R, which=which, dropout=0.2)
    parts = in_turn.run(M, D, R, which=which, dropout=0.2, most_inner=4 * 2 * R * 600)  # two strips of 256 rows
    assert (len(at_once.launchers.launches), len(in_turn.launchers.launches)) == (2, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.slow
def test_strips_grow_with_the_rows():
    grad = Grad()
    grad.run(32 * 256 + 40, 8, 3, dropout=0.2)  # strips of 272 rows, of which the last has 72
    assert len(grad.launchers.launches) == 2


def test_launch_error_is_reported():
    grad = Grad()
    grad.launchers.fail_next(1)
    assert grad.run(3, 72, 3) == "an error of the test"


def test_indices_are_64_bit():
    """The last block of 2^34 values of Z: the pointers are moved back, so that only the end of each tensor is there."""
    device = Grad().device
    rows, D, R, dropout = 37, 1032, 136, 0.3
    M = 65534 * 256 + rows
    draw = torch.Generator().manual_seed(0)
    Z, L = (torch.randn(rows, columns, generator=draw).bfloat16() for columns in (D, R))
    F, seed = torch.randn(D, R, generator=draw), torch.tensor([-(2**40) - 12345])
    inner, outer = (device.upload(np.zeros((n, R), np.float32)) for n in (rows, D))
    device.run(
        kernel := device.kernel("tall_skinny", "bfloat16Li4ELb1ELb1E"),
        device._pack(kernel, [
            device.upload(bits(Z)).address - 2 * (M - rows) * D, device.upload(bits(F)),
            device.upload(bits(L)).address - 2 * (M - rows) * R, device.upload(bits(seed)),
            inner.address - 4 * (5 * M - rows) * R, outer.address - 4 * 65534 * D * R,
            0, M, D, R, 256, 0, int(dropout * 2**32 + 0.5), 0, 0,
        ]),
        Launch((5, 65535, 5), (128, 1, 1), only_last=True),
    )  # fmt: skip
    z = (Z * unfused.mask(Z, slice(M - rows, M), dropout, seed))[:, 1024:].double()
    expected_inner, expected_outer = torch.zeros(rows, R).double(), torch.zeros(D, R).double()
    expected_inner[:, 128:] = z @ F[1024:, 128:].bfloat16().double()
    expected_outer[1024:, 128:] = z.T @ L[:, 128:].double()
    for got, expected in ((inner, expected_inner), (outer, expected_outer)):  # float32 sums of a few dozen values
        torch.testing.assert_close(torch.from_numpy(got.numpy()).double(), expected, rtol=2**-22, atol=1e-5)
