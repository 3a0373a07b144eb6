"""lora_linear at its edges: empty layers, what is kept for backward, infinities that are dropped, transforms."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from nf4lora import ops
from nf4lora.ops import reference

from support import host
from support.bits import assert_same_bits
from support.lora_case import Case, assert_close

raw = torch.ops.nf4lora
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- nothing, or one of each ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_with_nothing_or_one_of_anything(device, instruction_set, dtype, dropout):
    # 40 tokens take another kernel than a few do.
    for M, N, K, R in itertools.product((0, 1, 40), (0, 1), (0, 32), (0, 1)):
        case = Case(M, N, K, R, 32, dtype, double_quant=False, dropout=dropout, device=device)
        if K == 0:  # randn / 0 ** 0.5 would be NaN
            case.A = torch.zeros(R, 0, device=device) if R else None
        what = f"M {M}, N {N}, K {K}, R {R}"
        for implementation in (raw, host.kernel("dense", device)):
            y, S = implementation.lora_linear(*case.forward())
            expected_y, expected_S = reference.lora_linear(*case.forward())
            assert_close(S, expected_S, 2**-6, f"S of {what}")
            assert_close(y, expected_y, 2**-6, f"y of {what}")
            dx, dA, dB = implementation.lora_linear_backward(*case.backward(expected_S), True)
            expected = reference.lora_linear_backward(*case.backward(expected_S))
            assert_close(dx, expected[0], 2**-6, f"dx of {what}")
            if R:
                assert_close(dA, expected[1], 2**-6, f"dA of {what}")
                assert_close(dB, expected[2], 2**-6, f"dB of {what}")


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (0,), (2, 0, 64)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_an_empty_weight_is_packed_and_unpacked(device, shape, double_quant):
    qweight, absmax = ops.nf4_quantize(torch.empty(shape, device=device), 64)
    assert qweight.shape == (*shape[:-1], shape[-1] // 2)
    assert absmax.shape == (*shape[:-1], shape[-1] // 64)
    if double_quant:
        absmax_q, nested = ops.absmax_quantize(absmax)
        assert nested.tolist() == [0.0]
        assert absmax_q.shape == absmax.shape
        absmax = ops.absmax_dequantize(absmax_q, nested)
    assert ops.nf4_dequantize(qweight, absmax).shape == shape
    assert reference.nf4_dequantize(*reference.nf4_quantize(torch.empty(shape))).shape == shape


def test_a_rank_of_zero_is_refused():
    case = Case()
    with pytest.raises(ValueError, match=r"lora_A must be \[R, 256\] with R >= 1, got shape \[0, 256\]"):
        ops.lora_linear(*case.forward()[:5], torch.zeros(0, 256), torch.zeros(100, 0))


# ---- kept for the backward pass -------------------------------------------------------------------------------------


def kept(case, trained):
    """Bytes that a call keeps beside its arguments' own: of x, and of what it made."""
    tensors = {"x": case.x, "A": case.A, "B": case.B}
    for name, tensor in tensors.items():
        if tensor is not None:
            tensor.requires_grad_(name in trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(case.x, case.qweight, case.absmax, case.nested, case.bias, case.A, case.B, *case.options)
    state = {
        t.data_ptr() for t in (case.qweight, case.absmax, case.nested, case.A, case.B, case.options[2]) if t is not None
    }
    return sum(t.nbytes for t in saved if t.data_ptr() not in state)


def test_x_is_kept_for_A_and_S_for_B_and_neither_for_a_layer_that_nobody_trains(device):
    case = Case(M=50, K=256, R=8, dtype=torch.bfloat16, device=device)
    x, S = 50 * 256 * 2, 50 * 8 * 2
    assert kept(case, "xAB") == kept(case, "AB") == x + S
    assert kept(case, "xA") == x
    assert kept(case, "xB") == S
    assert kept(case, "x") == 0
    assert kept(Case(M=50, K=256, R=0, dtype=torch.bfloat16, device=device), "x") == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [3, 60])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_gradient_is_the_same_whichever_others_are_wanted(device, dtype, M, dropout):
    case = Case(M=M, R=5, dtype=dtype, dropout=dropout, device=device)
    _, S = raw.lora_linear(*case.forward())
    dy, x, S, *rest = case.backward(S)
    for implementation in (raw, host.kernel("dense", device)):
        everything = implementation.lora_linear_backward(dy, x, S, *rest, True)
        for with_x, with_S, need_dx in itertools.product((True, False), repeat=3):
            some = implementation.lora_linear_backward(dy, x if with_x else None, S if with_S else None, *rest, need_dx)
            for got, expected, wanted in zip(some, everything, (need_dx, with_x, with_S), strict=True):
                assert torch.equal(got, expected) if wanted else got.shape == (0,)


@pytest.mark.parametrize("trained", ["x", "A", "B", "xA", "xB", "AB", "xAB"])
@pytest.mark.parametrize("compiled", [False, True])
def test_whoever_is_trained_gets_the_gradient_that_all_would_get(trained, compiled):
    def gradients(which):
        case = Case(dropout=0.2)
        inputs = {"x": case.x, "A": case.A, "B": case.B}
        for name in which:
            inputs[name].requires_grad_()

        def call(x, A, B):
            return ops.lora_linear(x, case.qweight, case.absmax, case.nested, case.bias, A, B, *case.options)

        call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
        call(*inputs.values()).backward(case.dy)
        return {name: inputs[name].grad for name in which}

    torch._dynamo.reset()
    expected = gradients("xAB")
    for name, grad in gradients(trained).items():
        assert_same_bits(grad, expected[name], name)


def test_backward_checks_what_it_is_given_without_x(device):
    case = Case(device=device)
    dy, _, _, *rest = case.backward(None)
    with pytest.raises(ValueError, match=r"dy must be \[13 tokens, 100\], got shape \[13, 99\]"):
        raw.lora_linear_backward(dy[:, :99], None, None, *rest, True)
    with pytest.raises(TypeError, match="dy must be float32, bfloat16 or float16, got float64"):
        raw.lora_linear_backward(dy.double(), None, None, *rest, True)
    with pytest.raises(TypeError, match="S must be float32, got bfloat16"):
        raw.lora_linear_backward(dy, None, torch.zeros(13, 16, device=device).bfloat16(), *rest, True)


def test_opcheck_of_the_backward_without_x_or_S(device):
    case = Case(device=device)
    _, S = raw.lora_linear(*case.forward())
    dy, x, S, *rest = case.backward(S)
    for x_, S_ in ((None, S), (x, None), (None, None)):
        torch.library.opcheck(raw.lora_linear_backward.default, (dy, x_, S_, *rest, True))


# ---- infinities that dropout drops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [4, 40])
def test_an_infinity_that_is_dropped_is_zero(device, instruction_set, dtype, M):
    case = Case(M=M, N=8, K=64, R=4, dtype=dtype, dropout=0.5, device=device, bias=False)
    mask = reference.dropout_mask(M, 64, 0.5, case.options[2].cpu()).to(device)
    case.x[~mask] = float("inf")
    case.A.fill_(1.0)
    for implementation in (raw, host.kernel("dense", device), reference):
        _, S = implementation.lora_linear(*case.forward())
        assert S.isfinite().all(), implementation
        flags = () if implementation is reference else (True,)
        _, dA, _ = implementation.lora_linear_backward(*case.backward(S.clone()), *flags)
        assert dA.isfinite().all(), implementation


@pytest.mark.parametrize("M", [4, 40])
def test_an_infinite_gradient_stays_where_it_is_not_dropped(device, instruction_set, M):
    case = Case(M=M, N=8, K=64, R=4, dropout=0.5, device=device, bias=False)
    mask = reference.dropout_mask(M, 64, 0.5, case.options[2].cpu()).to(device)
    case.A = torch.full_like(case.A, float("inf"))
    case.B, case.dy = case.B.abs() + 1, case.dy.abs() + 1
    for implementation in (raw, host.kernel("dense", device), reference):
        flags = () if implementation is reference else (True,)
        dx, _, _ = implementation.lora_linear_backward(*case.backward(case.x.new_ones(M, 4)), *flags)
        assert_same_bits(dx.isinf(), mask, implementation.__name__)
        assert not dx.isnan().any(), implementation


# ---- denormals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_is_packed_to_the_same_bytes_when_denormals_are_flushed(instruction_set, dtype):
    weight = torch.randn(8, 256)
    weight[1] = 0.0
    weight[2] *= 1e-39
    weight[3, :64] = 1.1e-38  # above 1e-38 and below 2^-126
    weight = weight.to(dtype)
    expected = ops.nf4_quantize(weight, 64)
    assert_same_bits(expected[0], reference.nf4_quantize(weight, 64)[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the setting is this thread's
    assert torch.set_flush_denormal(True)
    try:
        found = ops.nf4_quantize(weight, 64)
        still = float((torch.full((1,), 1e-39) * 1.0).item())
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert still == 0.0, "the caller's own setting must stay"
    for got, wanted in zip(found, expected, strict=True):
        assert_same_bits(got.view(torch.uint8), wanted.view(torch.uint8))
    assert (found[0][1] == 0x77).all(), "zeros are code 7"


# ---- other ways to differentiate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "A", "B"])
@pytest.mark.parametrize("reverse_too", [False, True])
def test_forward_mode_is_refused_not_dropped(name, reverse_too):
    case = Case()
    inputs = {"x": case.x, "A": case.A, "B": case.B}
    if reverse_too:
        case.x.requires_grad_()
    with forward_ad.dual_level():
        inputs[name] = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(NotImplementedError, match="^lora_linear: gradients must be taken by reverse mode"):
            ops.lora_linear(inputs["x"], *case.forward()[1:5], inputs["A"], inputs["B"], *case.options)
        plain = ops.lora_linear(*case.forward())  # others may differentiate meanwhile
    assert_same_bits(plain, ops.lora_linear(*case.forward()))


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_transforms_of_torch_func_are_refused(transform):
    case = Case()
    with pytest.raises(NotImplementedError, match=r"transform of torch.func \(vmap, grad, jvp\)"):
        transform(lambda x: ops.lora_linear(x, *case.forward()[1:]))(case.x)
