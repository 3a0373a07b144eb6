"""Products in AMX's tile registers, on any processor: the code that ships over instructions that are acted out.

Where the processor has AMX, every test of the ops runs with it too (`instruction_set`).
"""

import pytest
import torch

from nf4lora import _C, ops
from nf4lora.ops import reference

from support import amx
from support.bits import assert_same_bits


def drawn(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()


def summed_in_order(A, B):
    """A B^T as 16 steps of two values each are summed by one instruction, in float32: A [M, K], B [N, K]."""
    K = A.shape[1]
    sums = torch.zeros(A.shape[0], B.shape[0])
    for k in range(0, K, 32):
        pair = [torch.zeros_like(sums, dtype=torch.float32) for _ in range(2)]
        for i in range(k, min(k + 32, K)):
            exact = pair[i % 2].double() + A[:, i, None].double() * B[None, :, i].double()
            pair[i % 2] = exact.float()  # a fused multiply-add: two 8-bit mantissas and 24 bits fit into 53
        sums = sums + (pair[0] + pair[1])
    return sums


@pytest.mark.parametrize("K", [2, 32, 64, 96, 33, 1, 7, 130])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (16, 64), (17, 65), (5, 100), (40, 16), (33, 47)])
def test_sums_are_those_of_the_instruction_in_order(M, N, K):
    A, B = drawn(M, K), drawn(N, K, seed=1)
    expected = summed_in_order(A, B).bfloat16()
    for a in (False, True):
        for b in (False, True):
            got = amx.product(A.T if a else A, B.T if b else B, a_transposed=a, b_columns=b)
            assert_same_bits(got, expected, (a, b))


@pytest.mark.parametrize("chunk_steps", [16, 32, 512])
def test_sums_that_wait_for_another_chunk_are_the_same(chunk_steps):
    A, B = drawn(35, 203), drawn(50, 203, seed=1)
    assert_same_bits(amx.product(A, B, chunk_steps=chunk_steps), summed_in_order(A, B).bfloat16())


@pytest.mark.parametrize("R", [1, 8, 16, 17, 40])
@pytest.mark.parametrize("with_keep", [False, True])
@pytest.mark.parametrize("with_offset", [False, True])
def test_sums_begin_with_the_low_rank_product_and_the_offset(R, with_keep, with_offset):
    A, B, low = drawn(19, 64), drawn(70, 64, seed=1), (drawn(19, R, seed=2), drawn(70, R, seed=3))
    keep = torch.rand(19, 70) < 0.7 if with_keep else None
    offset = torch.randn(70) if with_offset else None
    got = amx.product(A, B, low=low, scale=0.3, keep=keep, offset=offset)
    expected = summed_in_order(*low) * torch.tensor(0.3)
    if with_keep:
        expected = expected * keep
    if with_offset:
        expected = expected + offset
    for k in range(0, 64, 32):  # one instruction after the other is added to what they begin with
        expected = expected + summed_in_order(A[:, k : k + 32], B[:, k : k + 32])
    assert_same_bits(got, expected.bfloat16())


def test_an_offset_alone_begins_the_sums():
    A, B, offset = torch.zeros(3, 32).bfloat16(), drawn(20, 32), torch.randn(20)
    assert_same_bits(amx.product(A, B, offset=offset), offset.bfloat16().expand(3, 20))


def test_subnormal_numbers_are_zeros():
    A = torch.tensor([[2.0**-130, 1.0]]).bfloat16()
    B = torch.tensor([[1.0, 0.0], [2.0**100, 2.0]]).bfloat16()
    assert amx.product(A, B).tolist() == [[0.0, 2.0]]


def test_registers_must_be_entered():
    assert amx.load().without_entering() > 0


# ---- as a layer uses them, beside the op on vectors of the least processor


@pytest.fixture
def scalar():
    _C.force_cpu_instruction_set("scalar")
    yield
    _C.force_cpu_instruction_set("")


def layer(M, N, K, R):
    qweight, absmax = ops.nf4_quantize(torch.randn(N, K) * 0.1)
    return {
        "x": torch.randn(M, K).bfloat16(), "qweight": qweight, "absmax": absmax, "bias": torch.randn(N).bfloat16(),
        "lora_A": torch.randn(R, K).bfloat16() * 0.1, "lora_B": torch.randn(N, R).bfloat16() * 0.1,
    }  # fmt: skip


def product_of(A, B):
    """A B in float64, and the same of the magnitudes: [2, M, N]."""
    return torch.stack([A.double() @ B.double(), A.double().abs() @ B.double().abs()])


def assert_close(got, wide, size, terms, more=0.0):
    """Sums of `terms` products in any order: 2^-24 of the sum of magnitudes for each, and one rounding to bfloat16."""
    allowed = size * terms * 2**-24 + wide.abs() * 2**-8 + more
    assert ((got.double() - wide).abs() <= allowed).all()


@pytest.mark.parametrize(("M", "N", "K", "R"), [(1, 3, 64, 1), (17, 33, 64, 8), (40, 70, 192, 16), (9, 129, 320, 24)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_and_backward_of_a_layer(scalar, M, N, K, R, dropout):
    given = layer(M, N, K, R)
    x, A, B = given["x"], given["lora_A"], given["lora_B"]
    W = ops.nf4_dequantize(given["qweight"], given["absmax"])
    seed = torch.tensor([7])
    mask = torch.ones(M, K) if not dropout else reference.dropout_mask(M, K, dropout, seed).float()
    kept, scaling, keep = (x * mask.bfloat16()), 2.0, 1 / (1 - dropout)

    for each in (x, A, B):
        each.requires_grad_()
    y = ops.lora_linear(
        x, given["qweight"], given["absmax"], None, given["bias"], A, B, scaling, dropout, seed if dropout else None
    )
    dy = drawn(M, N, seed=5)
    y.backward(dy)
    dx, dA, dB = (each.grad for each in (x, A, B))
    x, A, B, kept = (each.detach() for each in (x, A, B, kept))

    # A sum of low-rank products may be rounded to the neighbour of the op's: 2^-8 of what it is multiplied with.
    S = amx.product(kept, A)
    assert_close(S, *product_of(kept, A.T), K)
    S = (S.float() * keep).bfloat16()
    low = scaling * product_of(S, B.T)
    wide_y = x.double() @ W.double().T + low[0] + given["bias"].double()
    size_y = product_of(x, W.T)[1] + low[1] + given["bias"].double().abs()
    got_y = amx.product(x, W, low=(S, B), scale=scaling, offset=given["bias"].float())
    assert_close(got_y, wide_y, size_y, K + R)
    assert_close(y, wide_y, size_y, K + R, 2**-7 * low[1])

    T = amx.product(dy, B, b_columns=True)
    low = scaling * keep * product_of(T, A) * mask.double()
    wide_dx, size_dx = dy.double() @ W.double() + low[0], product_of(dy, W)[1] + low[1]
    got_dx = amx.product(dy, W, b_columns=True, low=(T, A), scale=scaling * keep, keep=mask.bool())
    assert_close(got_dx, wide_dx, size_dx, N + R)
    assert_close(dx, wide_dx, size_dx, N + R, 2**-7 * low[1])

    for rows, columns, scale, of_op in ((T, kept, scaling * keep, dA), (S, dy, scaling, dB.T)):
        got = amx.product(rows, columns, a_transposed=True, b_columns=True)
        wide, size = product_of(rows.T, columns)
        assert_close(got, wide, size, M)
        assert_close(of_op, scale * wide, scale * size, M, 2**-7 * scale * size)
