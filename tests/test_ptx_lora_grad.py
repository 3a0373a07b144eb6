"""The tall and skinny products of LoRA on CUDA, executed without a GPU and held against float64."""

import ctypes
import itertools
import re

import numpy as np
import pytest
import torch

from support.bits import assert_same_bits
from support.philox import kept
from support.ptx import ARCHITECTURES, PtxError, find_nvcc
from support.ptx.grid import Launch
from support.ptx.tall_skinny import DTYPES, H200, SOURCES, Products, TallSkinny, threshold
from support.ptx.tensors import bits

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")


@pytest.mark.slow
@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_float64_on_every_architecture(architecture, late_copies):
    Products(architecture, late_copies).run(85, 72, 3, dropout=0.3)


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
    Products().run(**case)


@pytest.mark.parametrize("which", ["inner", "outer", "both"])
@pytest.mark.parametrize("R", [9, 72])  # two tiles of eight, a rest; four of them thrice, a rest
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_instantiation(dtype, R, which):
    Products().run(37, 264, R, dtype, which, dropout=0.2)


@pytest.mark.parametrize("ranks", [(3, 5, 8), (16, 16), (8, 1, 30, 2), (40, 24)], ids=str)
@pytest.mark.parametrize("which", ["inner", "outer"])
@pytest.mark.parametrize("card", [0, H200])
def test_adapters_of_a_group_are_one_of_all_their_ranks(ranks, which, card):
    """Each has its own A, S and dA: the same bits as those of one adapter with all ranks."""
    case = dict(M=85, D=264, R=sum(ranks), which=which, F=(0, True), G=(0, True))
    apart, as_one = (Products(card=card).run(**case, ranks=given) for given in (ranks, None))
    assert_same_bits(apart[0], as_one[0])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_group_on_every_architecture(architecture):
    Products(architecture).run(85, 72, 12, which="inner", F=(0, True), ranks=(3, 4, 5), copy=4)
    Products(architecture).run(85, 72, 12, which="outer", G=(0, True), ranks=(3, 4, 5))


@pytest.mark.parametrize("copy", [None, 4])
def test_S_of_a_group_and_the_copy_that_all_of_them_continue(copy):
    Products().run(300, 72, 12, which="inner", F=(1, True), ranks=(3, 4, 5), copy=copy, most_inner=1)


@pytest.mark.parametrize("which", ["inner", "both"])
def test_P_can_be_columns_of_a_wider_matrix(which):
    Products().run(300, 72, 5, which=which, P_stride=17, most_inner=1)
    Products().run(37, 72, 5, which=which, P_stride=12, expansion=dict(columns=64))
    Products().run(37, 72, 260, which=which, P_stride=300, expansion=dict(columns=64))


@pytest.mark.slow
@pytest.mark.parametrize("card", [0, H200])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_repeats_bit_for_bit(dropout, card):
    shape = (300, 776, 5)  # two parts of either product, or many
    once, again = (Products(card=card).run(*shape, dropout=dropout) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [(300, 776, 5), (64, 2048, 24)], ids=str)
def test_P_alone_can_be_added_as_it_is_with_G(shape):
    both, alone = (Products(card=H200).run(*shape, which=which, adds_as_both=True) for which in ("both", "inner"))
    assert_same_bits(alone[0], both[0])


def test_without_rows_the_gradient_is_zero():
    assert not Products().run(0, 72, 3)[1].any()


def test_without_columns_the_product_is_zero():
    grad = Products()
    assert not grad.run(3, 0, 3)[0].any()
    assert len(grad.launchers.launches) == 1  # the sum of no parts; no grid of zero blocks, which is an error


@pytest.mark.parametrize(("shape", "which"), [((3, 72, 0), "both"), ((0, 72, 3), "inner"), ((3, 0, 3), "outer")])
def test_nothing_is_launched_for_nothing(shape, which):
    grad = Products()
    assert all(product.numel() == 0 for product in grad.run(*shape, which=which))
    assert grad.launchers.launches == []


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (dict(dtype=torch.float32), "float32, which the kernel for tall and skinny products does not take"),
        (dict(D=36), "a number of columns that is no multiple of 8"),
        (dict(offset=2), "Z off a multiple of 16 bytes"),
        (dict(which="outer", copy=5), "a copy or an expansion of no product"),
        (dict(which="outer", expansion=dict(columns=32)), "a copy or an expansion of no product"),
        (dict(R=0, copy=8), "a copy or an expansion of no product"),
        (dict(copy=5, expansion=dict(columns=32)), "a copy and an expansion at a time"),
        (dict(copy=-1), "rows of copy that are too short, or no multiple of 8"),
        (dict(copy=0), "rows of copy that are too short, or no multiple of 8"),
        (dict(ranks=(1, 2), which="inner"), "factors of more adapters than one, and not transposed"),
        (dict(ranks=(1, 2), which="outer"), "factors of more adapters than one, and not transposed"),
        (
            dict(ranks=(1, 2), F=(0, True), G=(0, True)),
            "either product of more adapters than one, in one pass",
        ),
        (
            dict(ranks=(1, 2), which="inner", F=(0, True), expansion=dict(columns=32)),
            "an expansion of a P of more adapters than one, before it is there",
        ),
        (dict(expansion=dict(columns=36, dropout=0.5)), "dropout of a number of columns that is no multiple of 8"),
    ],
)
def test_what_it_cannot_take_is_refused_before_a_launch(case, why):
    grad = Products()
    assert grad.run(**(dict(M=3, D=72, R=3) | case)) == why
    assert grad.launchers.launches == []


def work_space(M, D, R, which="both", card=H200, most_inner=64 << 20):
    """Bytes."""
    P, G = (16 if which != other else None for other in ("outer", "inner"))
    products = TallSkinny(dtype=1, P=P, G=G, M=M, D=D, R=R, most_inner=most_inner)
    launchers = Products(card=card).launchers
    return 4 * launchers.tall_skinny_workspace(ctypes.pointer(products), result=ctypes.c_int64)


@pytest.mark.parametrize("card", [0, H200])
@pytest.mark.parametrize("R", [16, 64, 256])
@pytest.mark.parametrize("D", [576, 4096, 14336])
def test_work_space_is_small_for_any_number_of_rows(D, R, card):
    multiprocessors = 132 if card else 2
    for M in (1, 64, 2048, 32768, 2**20, 2**24):
        of_P = max(64 << 20, 4 * -(-D // 256) * R * 256)
        assert work_space(M, D, R, "inner", card) <= of_P
        of_G = 4 * D * R + 2 * multiprocessors * 4 * 512 * 32
        assert work_space(M, D, R, "outer", card) <= of_G
        assert work_space(M, D, R, "both", card) <= of_P + of_G


@pytest.mark.parametrize("which", ["inner", "outer", "both"])
@pytest.mark.parametrize("R", [16, 64])
def test_about_two_blocks_a_multiprocessor(R, which):
    """So that the sums of their parts are few: of G one for each row of blocks, of P one for each column."""
    for M, D in itertools.product((512, 2048, 4096, 32768), (2048, 4096, 14336)):
        products = Products(card=H200)
        launches = products.record()
        P, G = (16 if which != other else None for other in ("outer", "inner"))
        arguments = TallSkinny(dtype=1, Z=16, P=P, G=G, M=M, D=D, R=R, most_inner=1 << 40)
        assert products.launchers.tall_skinny(ctypes.pointer(arguments), None) is None
        x, y, _ = launches[0].grid
        assert 132 / 2 < x * y <= max(2 * 132, x)


@pytest.mark.parametrize("which", ["inner", "both"])
def test_little_work_space_takes_several_launches(which):
    M, D, R = 3 * 256 + 40, 264, 5
    at_once, in_turn = Products(card=H200), Products(card=H200)
    once = at_once.run(M, D, R, which=which, dropout=0.2)
    parts = in_turn.run(M, D, R, which=which, dropout=0.2, most_inner=4 * 2 * R * 300)
    assert (len(at_once.launchers.launches), len(in_turn.launchers.launches)) == (2, 6)
    assert torch.equal(once[0], parts[0])
    assert work_space(M, D, R, which, most_inner=4 * 2 * R * 300) < work_space(M, D, R, which) / 2


@pytest.mark.parametrize(("which", "widths"), [("inner", "124"), ("outer", "1"), ("both", "12")])
@pytest.mark.parametrize("R", [5, 17, 64])
def test_blocks_of_every_width(R, which, widths):
    """Wide ones are taken where Z is wide for the card: the work of its multiprocessors stays even."""
    taken = set()
    for M, D, card in ((131, 264, H200), (131, 264, 0), (37, 2056 if R == 64 else 3080, 0), (131, 5128, 0)):
        products = Products(card=card)
        products.run(M, D, R, which=which, dropout=0.25)
        taken.add(re.search(r"tall_skinny_kernelI\w+?Li[24]ELi(\d)E", products.launchers.launches[0])[1])
    assert taken == set(widths)


@pytest.mark.slow
@pytest.mark.parametrize("R", [1, 2, 8, 16, 24, 33])
def test_any_rank(R):
    for card in (0, H200):
        Products(card=card).run(45, 1096, R, dropout=0.25, copy=-R % 8)


@pytest.mark.slow
@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pass_leaves_a_copy_that_P_continues(architecture, late_copies):
    Products(architecture, late_copies, H200).run(37, 584, 5, dropout=0.3, copy=3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("R", [1, 17, 40])  # of 40 two blocks make a part: one of them copies
@pytest.mark.parametrize("which", ["inner", "both"])
def test_the_copy_is_of_Z_before_dropout(which, R, dropout):
    for card, most_inner in ((0, 64 << 20), (H200, 64 << 20), (H200, 1)):
        Products(card=card).run(
            261, 520, R, torch.float16, which, dropout, copy=-R % 8 + 8 * (R == 17), most_inner=most_inner
        )


def test_launch_error_is_reported():
    grad = Products()
    grad.launchers.fail_next(1)
    assert grad.run(3, 72, 3) == "an error of the test"


def test_an_unaligned_copy_is_refused_before_a_launch():
    products = Products()
    arguments = TallSkinny(dtype=1, Z=16, P=16, M=3, D=72, R=3, copy=24, copy_stride=80)
    assert products.launchers.tall_skinny(ctypes.pointer(arguments), None) == "copy off a multiple of 16 bytes"
    assert products.launchers.launches == []


class Pass(ctypes.Structure):
    """As in csrc/cuda/lora_grad.cu."""

    _fields_ = [
        *[("inner", ctypes.c_void_p), ("outer", ctypes.c_void_p)],
        *[
            ("begin", ctypes.c_int64),
            ("end", ctypes.c_int64),
            ("strip", ctypes.c_int64),
            ("rank_groups", ctypes.c_uint),
        ],
    ]


@pytest.mark.parametrize("R", [13, 40])
@pytest.mark.parametrize(("which", "groups"), [("inner", 1), ("inner", 2), ("inner", 4), ("both", 1), ("both", 2)])
def test_indices_are_64_bit(which, groups, R):
    """The last block of 2^34 values of Z: the pointers are moved back, so that only the end of each tensor is there."""
    products = Products()
    device, columns, dropout, strip, rows = products.device, 256 * groups, 0.3, 256, 37
    parts, D = 5, 4 * columns + 8
    M, ranks = 65534 * strip + rows, 16 if R <= 16 else 32  # of a block
    first, before, stride = (R - 1) // ranks * ranks, M - rows, D + -(-R // 8) * 8
    draw = torch.Generator().manual_seed(0)
    Z, L = (torch.randn(rows, columns, generator=draw).bfloat16() for columns in (D, R))
    F, seed = torch.randn(D, R, generator=draw), torch.tensor([-(2**40) - 12345])
    inner, outer = (device.upload(np.zeros((n, R), np.float32)) for n in (rows, D))
    copy = device.upload(np.zeros((rows, stride), np.uint16))
    arguments = TallSkinny(
        dtype=1, Z=products.upload(Z) - 2 * before * D, F=products.upload(F), L=products.upload(L) - 2 * before * R,
        seed=products.upload(seed), threshold=threshold(dropout), inner_scale=1, outer_scale=1, P=16, G=16, M=M, D=D,
        R=R, copy=copy.address - 2 * before * stride & 2**64 - 1, copy_stride=stride,
    )  # fmt: skip
    rank_groups = first // ranks + 1
    of_pass = Pass(
        inner.address - 4 * (parts * M - rows) * R, outer.address - 4 * 65534 * D * R, 0, M, strip, rank_groups
    )
    kernel = device.kernel("tall_skinny", f"bfloat16Li{ranks // 8}ELi{groups}ELb1ELb{int(which == 'both')}E")
    last = Launch((parts * rank_groups, 65535, 1), (128, 1, 1), 0, True)
    device.run(kernel, bytes(arguments) + bytes(of_pass), last)
    begin = 4 * columns
    z = (Z * kept((M - before, D), before, dropout, seed.item()))[:, begin:].double()
    expected_inner, expected_outer = torch.zeros(rows, R).double(), torch.zeros(D, R).double()
    expected_inner[:, first:] = z @ F[begin:, first:].bfloat16().double()
    if which == "both":
        expected_outer[begin:, first:] = z.T @ L[:, first:].double()
    for got, expected in ((inner, expected_inner), (outer, expected_outer)):  # float32 sums of a few dozen values
        torch.testing.assert_close(torch.from_numpy(got.numpy()).double(), expected, rtol=2**-22, atol=1e-5)
    expected_copy = np.zeros((rows, stride), np.uint16)
    if rank_groups == 1:  # otherwise a block of the first ranks copies
        expected_copy[:, begin:D] = bits(Z[:, begin:]).reshape(rows, -1)
    assert (copy.numpy() == expected_copy).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "mistake", "why"),
    [
        ("      __syncwarp();  // the tile is whole", "      // the tile is whole", "race: a read of shared memory"),
        ("      __syncthreads();  // one is enough", "      // one is enough", "race: a read of shared memory"),
        ("wait_for_copies<kStages - 2>();", "wait_for_copies<kStages - 1>();", "not close"),
        ("if (m >= end || r >= R) continue;", "if (r >= R) continue;", "race|out of bounds"),
    ],
    ids=["no warp barrier", "no block barrier", "no wait", "no bound"],
)
def test_a_planted_mistake_is_noticed(tmp_path, text, mistake, why):
    """The control of all of the above."""
    source = SOURCES[0].read_text()
    assert source.count(text) == 1
    planted = tmp_path / SOURCES[0].name
    planted.write_text(source.replace(text, mistake))
    with pytest.raises((PtxError, AssertionError), match=why):
        Products(sources=(planted, *SOURCES[1:])).run(37, 584, 5, dropout=0.3, copy=3)
