"""lora_linear in plain torch, as CUDA runs it until the fused kernels are there: called directly on CPU tensors."""

import pytest
import torch

from nf4lora import _C
from nf4lora.ops import reference
from nf4lora.ops.kernels import unfused

from support.bits import assert_same_bits
from support.torch_kernels import assert_makes_no_dx, assert_refuses_as_others, drawn_layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Both sides sum in float32, in another order, and round once: two neighbours of the dtype at most one step apart.
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
M, N, K = 10, 24, 256
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def layer(dtype, **options):
    return drawn_layer(dtype, N, K, **options)


def assert_near(got, expected, dtype, *, through=0.0):
    """`through`: what one step of an intermediate result of the dtype (S or T) does to this one."""
    assert got.dtype == expected.dtype
    size = expected.float().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=STEP[dtype], atol=STEP[torch.float32] * size + through)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"lora": False},
        {"lora": False, "bias": False, "double_quant": False},
        {"dropout": 0.25},
        {"dropout": 0.9, "double_quant": False, "blocksize": 32},
        {"blocksize": 256, "lead": (2, 3)},
        {"lead": (0,), "dropout": 0.5},
        {"lead": ()},
    ],
    ids=str,
)
def test_forward_and_backward_equal_the_reference(dtype, options):
    x, dy, arguments, bias = layer(dtype, **options)
    y, S = unfused.lora_linear(x, bias=bias, **arguments)
    expected_y, expected_S = reference.lora_linear(x, bias=bias, **arguments)
    assert y.shape == expected_y.shape
    assert_near(S, expected_S, dtype)
    step = STEP[dtype] * arguments["scaling"]
    reach_S = 0.0 if not S.numel() else step * (S.float().abs() @ arguments["lora_B"].abs().T).max().item()
    assert_near(y, expected_y, dtype, through=reach_S)

    dx, dA, dB = unfused.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    expected_dx, expected_dA, expected_dB = reference.lora_linear_backward(dy, x, S, **arguments)
    if expected_dA is None:
        assert dA.shape == dB.shape == (0,)
        assert_near(dx, expected_dx, dtype)
        return
    T = (dy.reshape(-1, N).float() @ arguments["lora_B"]).abs()
    keep = 1.0 - arguments["dropout"]
    reach_dx = 0.0 if not T.numel() else step / keep * (T @ arguments["lora_A"].abs()).max().item()
    reach_dA = step / keep * (T.T @ x.reshape(-1, K).float().abs()).max().item()
    assert_near(dx, expected_dx, dtype, through=reach_dx)
    assert_near(dA, expected_dA, torch.float32, through=reach_dA)
    assert_near(dB, expected_dB, torch.float32)


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1, -1, -(2**63), 0x123456789ABCDEF])
def test_random_words_equal_the_reference(seed):
    got = unfused._philox(torch.tensor([seed]), 0, 4096)
    assert_same_bits(got, reference.philox(seed, 4096))


def test_random_words_equal_the_published_vectors():
    # Random123 1.14, kat_vectors: philox4x32-10 with counter and key of zeros, and with a counter of block 2^32 + 5.
    words = unfused._philox(torch.tensor([0]), 0, 4)
    assert [hex(w) for w in words.tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_random_words_far_into_the_stream():
    # Beyond 2^32 blocks the counter's second word counts; a slice must equal the same words of a longer one.
    start = 4 * (2**32 - 2)
    words = unfused._philox(torch.tensor([7]), start, start + 16)
    assert_same_bits(words[8:], unfused._philox(torch.tensor([7]), start + 8, start + 16))
    assert len(set(words.tolist())) == 16


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.999])
def test_mask_equals_the_reference(dropout):
    rows, seed = torch.empty(37, 96), torch.tensor([99])
    mask = unfused.mask(rows, slice(0, 37), dropout, seed)
    assert_same_bits(mask, reference.dropout_mask(37, 96, dropout, seed))
    assert_same_bits(unfused.mask(rows, slice(11, 20), dropout, seed), mask[11:20])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_slices_of_rows_change_nothing_but_the_order_of_sums(monkeypatch, dropout):
    x, dy, arguments, bias = layer(torch.float32, dropout=dropout)

    def run():
        y, S = unfused.lora_linear(x, bias=bias, **arguments)
        return y, S, *unfused.lora_linear_backward(dy, x, S, need_dx=True, **arguments)

    whole = run()
    monkeypatch.setattr(unfused, "_SLICE", 3 * K)  # three rows at a time, then one
    for got, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_dx_is_not_made_unless_wanted():
    assert_makes_no_dx(unfused, torch.bfloat16, N, K)


def test_arguments_are_checked_in_the_words_of_the_other_kernels():
    assert_refuses_as_others(unfused)


@pytest.mark.skipif(not _C.CUDA_VERSION, reason="built without CUDA")
def test_it_is_what_cuda_tensors_get():
    x, dy, arguments, bias = layer(torch.float32, dropout=0.5)
    a = arguments
    given = x, a["qweight"], a["absmax"], a["nested"], bias, a["lora_A"], a["lora_B"], 1.75, 0.5, a["seed"], 64
    y, S = torch.ops.nf4lora.lora_linear.default.redispatch(CUDA, *given)
    assert_same_bits(y, unfused.lora_linear(x, bias=bias, **a)[0])
    given = dy, x, S, a["qweight"], a["absmax"], a["nested"], a["lora_A"], a["lora_B"], 1.75, 0.5, a["seed"], 64, True
    for got, expected in zip(
        torch.ops.nf4lora.lora_linear_backward.default.redispatch(CUDA, *given),
        unfused.lora_linear_backward(dy, x, S, need_dx=True, **a),
        strict=True,
    ):
        assert_same_bits(got, expected)
