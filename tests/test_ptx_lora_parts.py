"""The sums of partial sums on CUDA and what they are expanded to, executed without a GPU and held against float64."""

import ctypes
import itertools

import numpy as np
import pytest
import torch

from support.bits import assert_same_bits
from support.philox import kept
from support.ptx import ARCHITECTURES, PtxError, find_nvcc
from support.ptx.tall_skinny import (
    DTYPES,
    H200,
    HALF_ULP,
    SEED_OF_OUT,
    SOURCES,
    Expansion,
    Parts,
    Products,
    TallSkinny,
    of,
    threshold,
)
from support.ptx.tensors import bits

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_float64_on_every_architecture(architecture):
    Products(architecture, card=H200).run(85, 72, 5, expansion=dict(columns=320, dropout=0.3))


@pytest.mark.parametrize("R", [1, 5, 16, 17, 64, 72, 256, 300])  # shared memory takes 64 at a time, and at most 256
def test_any_rank(R):
    Products().run(70, 72, R, which="inner", expansion=dict(columns=296, dropout=0.2, bias=False))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype_of_E", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_any_layout_and_dtype(dtype, dtype_of_E, transposed):
    Products().run(19, 72, 6, dtype, expansion=dict(columns=104, E=(dtype_of_E, transposed)))


@pytest.mark.parametrize("columns", [1, 7, 33, 250, 257])
@pytest.mark.parametrize("transposed", [False, True])
def test_any_number_of_columns(columns, transposed):
    Products().run(37, 72, 5, which="inner", expansion=dict(columns=columns, E=(0, transposed)))


@pytest.mark.parametrize("bias", [False, True])
def test_unaligned_tensors_take_the_slow_path(bias):
    Products().run(37, 72, 5, expansion=dict(columns=64, bias=bias, offset=2))
    Products().run(37, 72, 5, expansion=dict(columns=64, bias=bias, E=(1, False), offset_of_E=2))


@pytest.mark.parametrize("M", [1, 63, 64, 65, 129])
def test_any_number_of_rows(M):
    Products().run(M, 264, 5, expansion=dict(columns=520, dropout=0.2))


@pytest.mark.parametrize("R", [5, 260])
def test_rows_of_several_launches(R):
    """Their places among the words of dropout go on from one launch to the next."""
    products = Products()
    products.run(600, 72, R, expansion=dict(columns=64, dropout=0.2, bias=False), most_inner=1)
    assert len(products.launchers.launches) == (6 if R == 5 else 9)


@pytest.mark.parametrize("ranks", [(5,), (16, 16, 16), (3, 5, 8), (8, 1, 30, 2), (100, 200), (260,)], ids=str)
@pytest.mark.parametrize("options", [dict(), dict(bias=True, P_stride=320), dict(dtype_of_E=1, dropout=0.2)], ids=str)
def test_the_expansion_of_a_P_that_is_there(ranks, options):
    products = Products()
    assert not isinstance(products.expand(70, 104, ranks, **options), str)
    assert len(products.launchers.launches) == 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_expansion_of_a_group_on_every_architecture(architecture):
    Products(architecture, card=H200).expand(85, 320, (3, 5, 8))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(dtype=0), "float32, which the kernel for tall and skinny products does not take"),
        (dict(P=None), "no expansion, or one of no product"),
        (dict(expansion=Expansion()), "no expansion, or one of no product"),
        (
            dict(expansion=Expansion(out=16, columns=36, seed=16)),
            "dropout of a number of columns that is no multiple of 8",
        ),
        (
            dict(expansion=Expansion(out=16, columns=32, E_is_transposed=True)),
            "factors of more adapters than one, and transposed",
        ),
    ],
)
def test_an_expansion_that_it_cannot_make_is_refused_before_a_launch(change, why):
    products = Products()
    given = dict(dtype=1, P=16, M=3, R=5, first_rank=(0, 2), expansion=Expansion(out=16, columns=32)) | change
    assert products.launchers.expand(ctypes.pointer(TallSkinny(**given)), None) == why
    assert products.launchers.launches == []


def test_the_expansion_is_no_launch_more():
    products = Products()
    products.run(37, 72, 16, expansion=dict(columns=64))
    assert len(products.launchers.launches) == 2


def test_P_and_G_are_the_same_bits_with_and_without_an_expansion():
    P, G = Products().run(300, 264, 5, dropout=0.2)
    expanded = Products().run(300, 264, 5, dropout=0.2, expansion=dict(columns=64, dropout=0.2))
    again = Products().run(300, 264, 5, dropout=0.2, expansion=dict(columns=64, dropout=0.2))
    for a, b in ((P, expanded[0]), (G, expanded[1]), *zip(expanded, again, strict=True)):
        assert_same_bits(a, b)


def test_without_columns_of_Z_the_bias_is_left():
    P, out = Products().run(3, 0, 5, which="inner", expansion=dict(columns=64))
    assert not P.any()
    assert out.any()


def test_without_rows_the_gradient_is_zero():
    assert not Products().run(0, 72, 3, expansion=dict(columns=64))[1].any()


def expanding(M, D, R, columns):
    """Grids of the pass and of the expansion on a large card."""
    products = Products(card=H200)
    launches = products.record()
    expansion = Expansion(out=16, E=of(16), columns=columns, scale=1.0)
    arguments = TallSkinny(dtype=1, Z=16, P=16, M=M, D=D, R=R, most_inner=1 << 40, expansion=expansion)
    assert products.launchers.tall_skinny(ctypes.pointer(arguments), None) is None
    return (launch.grid for launch in launches)


@pytest.mark.parametrize("R", [8, 16, 64])
def test_fewer_bytes_of_parts_are_read_than_of_out_are_written(R):
    for M, D, columns in itertools.product((64, 512, 4096, 32768), (2048, 4096, 14336), (2048, 4096, 14336)):
        of_pass, of_expansion = expanding(M, D, R, columns)
        parts, splits = of_pass[0] // -(-R // (16 if R <= 16 else 32)), of_expansion[0] // -(-M // 64)
        assert splits == 1 or splits * 4 * M * R * parts <= 2 * M * columns
        enough = 4 * R * parts * (2 * 132 // -(-M // 64)) <= 2 * columns and columns * M >= 2 * 132 * 64 * 256
        assert of_expansion[0] >= (132 if enough else 1)


@pytest.mark.parametrize("R", [5, 100, 300])
def test_indices_of_the_expansion_are_64_bit(R):
    """The last rows of 2^34 values of out: the pointers are moved back, so that only the end of a tensor is there."""
    products = Products()
    device, rows, columns, begin = products.device, 37, 296, 10**6
    M = 2**26 + rows
    draw = torch.Generator().manual_seed(R)
    inner, factor = torch.randn(rows, R, generator=draw), torch.randn(R, columns, generator=draw)
    P = (2.0 * inner).bfloat16()
    # Above 256 ranks a launch before writes P, of which only the last block is run here.
    there = device.upload(bits(P)) if R > 256 else device.empty((rows, R), np.uint16)
    out = device.empty((rows, columns), np.uint16)
    expansion = Expansion(
        out=out.address - 2 * (begin + M - rows) * columns & 2**64 - 1, E=of(products.upload(factor)),
        seed=products.upload(SEED_OF_OUT), threshold=threshold(0.3), scale=0.75, columns=columns,
    )  # fmt: skip
    arguments = TallSkinny(
        dtype=1, P=there.address - 2 * (begin + M - rows) * R & 2**64 - 1, inner_scale=2.0, D=264, R=R,
        expansion=expansion,
    )  # fmt: skip
    summed = Parts(products.upload(inner) - 4 * (M - rows) * R & 2**64 - 1, 16, 1, 0, begin, M, False)
    products.launchers.only_last_block = True
    products.launchers.add_parts(ctypes.pointer(arguments), ctypes.pointer(summed), None, result=None)
    mask = kept((rows, columns), begin + M - rows, 0.3, SEED_OF_OUT.item())
    expected = 0.75 * mask * (P.double() @ factor.bfloat16().double())
    got = torch.from_numpy(out.numpy()).view(torch.bfloat16).reshape(rows, columns)
    torch.testing.assert_close(got.double(), expected, rtol=HALF_ULP[torch.bfloat16], atol=2e-5)
    assert (there.numpy() == bits(P)).all() if R > 256 else (there.numpy() == bits(P).reshape(rows, R)).all()


def test_indices_of_the_sum_are_64_bit():
    """The last block of the sum, where G lies behind P, of which one part is 2^33 values."""
    products = Products()
    device, R, D, parts = products.device, 4, 24, 3
    M, values = 2**31, 96  # of G, in the last block of 256 threads alone, M R being a multiple of 256
    drawn = torch.randn(parts, values, generator=torch.Generator().manual_seed(0))
    G = device.empty(values, np.float32)
    arguments = TallSkinny(dtype=1, P=16, G=G.address, dtype_of_G=0, inner_scale=1.0, outer_scale=0.5, D=D, R=R)
    summed = Parts(16, products.upload(drawn), 1, parts, 0, M, True)
    products.launchers.only_last_block = True
    products.launchers.add_parts(ctypes.pointer(arguments), ctypes.pointer(summed), None, result=None)
    assert torch.equal(torch.from_numpy(G.numpy()), 0.5 * (drawn[0] + drawn[1] + drawn[2]))
    # And without G: the last values of P, in a copy too.
    drawn = torch.randn(3, 64, R, generator=torch.Generator().manual_seed(1))
    for summands, M in ((1, 2**33 + 64), (3, 64)):
        P, copy = device.empty((64, R), np.uint16), device.upload(np.zeros((64, D + 8), np.uint16))
        of_inner = products.upload(drawn) - 4 * (M - 64) * R
        arguments = TallSkinny(
            dtype=1, P=P.address - 2 * (M - 64) * R & 2**64 - 1, inner_scale=1.0, D=D, R=R,
            copy=copy.address - 2 * (M - 64) * (D + 8) & 2**64 - 1, copy_stride=D + 8,
        )  # fmt: skip
        summed = Parts(of_inner & 2**64 - 1, 16, summands, 0, 0, M, False)
        products.launchers.add_parts(ctypes.pointer(arguments), ctypes.pointer(summed), None, result=None)
        last = device.memory.data[P.address + 32 * R * 2 : P.address + 64 * R * 2].view(np.uint16)
        expected = drawn[0] if summands == 1 else drawn[0] + drawn[1] + drawn[2]
        assert (last == bits(expected[32:].bfloat16())).all()  # the last block: 256 values of copy, 32 rows of 8
        rows = np.zeros((64, D + 8), np.uint16)
        rows[32:, D : D + R] = bits(expected[32:].bfloat16()).reshape(32, R)
        assert (copy.numpy() == rows).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "mistake", "why"),
    [
        ("  __syncthreads();\n\n  const uint64_t seed", "  const uint64_t seed", "race: a read of shared memory"),
        (
            "if (first_d == 0) *own = value;",
            "*own = value;",
            "race: two threads write|race: a write to global memory",
        ),
        ("if (m >= parts.rows) continue;", "", "out of bounds"),
        ("exists = is_rank &&", "exists =", "out of bounds|never written|not close"),
    ],
    ids=["no barrier", "every block writes P", "no bound", "no end of ranks"],
)
def test_a_planted_mistake_is_noticed(tmp_path, text, mistake, why):
    """The control of all of the above."""
    source = SOURCES[1].read_text()
    assert source.count(text) == 1
    planted = tmp_path / SOURCES[1].name
    planted.write_text(source.replace(text, mistake))
    with pytest.raises((PtxError, AssertionError), match=why):
        Products(sources=(SOURCES[0], planted)).run(37, 72, 5, expansion=dict(columns=1030, E=(0, True)))
