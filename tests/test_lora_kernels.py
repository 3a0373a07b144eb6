"""Few and fused (csrc/cuda/lora_few.cpp, lora_fused.cpp), on a card or with loops on the host in place of launchers."""

import itertools

import pytest
import torch

from nf4lora.ops import reference

from support import host
from support.lora_case import FLOAT_SUM, ULP, Case, assert_close

DTYPES = [torch.bfloat16, torch.float16]
LAYERS = [
    dict(), dict(bias=False), dict(R=0), dict(R=0, bias=False), dict(double_quant=False), dict(dropout=0.3),
    dict(dropout=0.9, blocksize=32, K=96), dict(R=5, N=24, K=64), dict(M=1), dict(M=16, R=33),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("name", ["few", "fused"])
def test_forward_equals_the_reference(device, name, options, dtype):
    case = Case(dtype=dtype, device=device, **options)
    y, S = host.kernel(name, device).lora_linear(*case.forward())
    expected_y, expected_S = reference.lora_linear(*case.forward())
    assert_close(S, expected_S, ULP[dtype], "S")
    assert_close(y, expected_y, 2 * ULP[dtype], "y")  # S may be a last place away


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [options | dict(N=options.get("N", 104)) for options in LAYERS], ids=str)
def test_backward_equals_the_reference(device, options, dtype):
    case = Case(dtype=dtype, device=device, **options)
    S = reference.lora_linear(*case.forward())[1]
    dx, dA, dB = host.kernel("fused", device).lora_linear_backward(*case.backward(S), True)
    expected = reference.lora_linear_backward(*case.backward(S))
    assert_close(dx, expected[0], 2 * ULP[dtype], "dx")
    if case.A is None:
        assert dA.shape == dB.shape == (0,)
        return
    assert_close(dA, expected[1], ULP[dtype], "dA")  # T may be a last place away
    assert_close(dB, expected[2], FLOAT_SUM, "dB")


@pytest.mark.parametrize("kernel", ["fused", "dense"])
@pytest.mark.parametrize(
    ("of_A", "of_B"), list(itertools.product([torch.bfloat16, torch.float16, torch.float32], repeat=2))
)
def test_gradients_have_the_dtypes_of_their_factors(device, kernel, of_A, of_B):
    for dtype in [*DTYPES, *([torch.float32] if kernel == "dense" else [])]:
        case = Case(N=104, dtype=dtype, device=device)
        case.A, case.B = case.A.to(of_A), case.B.to(of_B)
        S = reference.lora_linear(*case.forward())[1]
        _, dA, dB = host.kernel(kernel, device).lora_linear_backward(*case.backward(S), True)
        expected = reference.lora_linear_backward(*case.backward(S))
        assert_close(dA, expected[1].to(of_A), ULP[torch.bfloat16], "dA")
        assert_close(dB, expected[2].to(of_B), ULP[torch.bfloat16], "dB")


@pytest.mark.parametrize("kernel", ["fused", "dense"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_gradient_is_the_same_whichever_others_are_wanted(device, kernel, dropout):
    case = Case(M=24, N=104, R=5, dtype=torch.bfloat16, dropout=dropout, device=device)
    backward = host.kernel(kernel, device).lora_linear_backward
    dy, x, S, *rest = case.backward(reference.lora_linear(*case.forward())[1])
    everything = backward(dy, x, S, *rest, True)
    for with_x, with_S, need_dx in itertools.product((True, False), repeat=3):
        results = backward(dy, x if with_x else None, S if with_S else None, *rest, need_dx)
        for got, expected, wanted in zip(results, everything, (need_dx, with_x, with_S), strict=True):
            assert torch.equal(got, expected) if wanted else got.shape == (0,)


@pytest.mark.parametrize("kernel", ["few", "fused", "dense"])
def test_a_view_off_its_alignment_is_copied(device, kernel):
    case = Case(N=104, dtype=torch.bfloat16, device=device)
    case.x = torch.cat([case.x.flatten()[:1], case.x.flatten()])[1:].view_as(case.x)
    assert case.x.data_ptr() % 16
    y, S = host.kernel(kernel, device).lora_linear(*case.forward())
    assert_close(y, reference.lora_linear(*case.forward())[0], 2 * ULP[torch.bfloat16], "y")
    if kernel == "few":
        return
    case.dy = torch.cat([case.dy.flatten()[:1], case.dy.flatten()])[1:].view_as(case.dy)
    results = host.kernel(kernel, device).lora_linear_backward(*case.backward(S), True)
    for got, expected in zip(results, reference.lora_linear_backward(*case.backward(S)), strict=True):
        assert_close(got, expected, 2 * ULP[torch.bfloat16], "a gradient")
