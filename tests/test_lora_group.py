"""lora_linear_group: layers of one x in one op, on the CPU, on a card, and by csrc/cuda/lora_group.cpp over loops."""

import pytest
import torch

from nf4lora import ops
from nf4lora.ops import reference
from nf4lora.ops.lora_group import MOST_SIBLINGS, Layers, lora_linear_group

from support import host
from support.bits import assert_same_bits
from support.host import launches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
K = 320
QKV = ((128, 8), (32, 4), (64, 4))  # out features and rank of each layer
GROUPS = [QKV, ((96, 4), (160, 4)), ((64, 3), (32, 1), (8, 5), (40, 16)), ((64, 130), (64, 140))]


def drawn_group(dtype, of=QKV, *, K=K, lead=(10,), double_quant=True, bias=True, blocksize=64, scaling=2.0):
    """x, the dy, and the layers; every second layer has a bias."""
    x = torch.randn(*lead, K).to(dtype)
    lists = {name: [] for name in ("qweight", "absmax", "nested", "bias", "lora_A", "lora_B")}
    for i, (N, R) in enumerate(of):
        qweight, absmax = ops.nf4_quantize(torch.randn(N, K) / K**0.5, blocksize)
        nested = None
        if double_quant:
            absmax, nested = ops.absmax_quantize(absmax)
        one = qweight, absmax, nested, torch.randn(N).to(dtype) if bias and i % 2 == 0 else None
        one += torch.randn(R, K) / K**0.5, torch.randn(N, R) / R**0.5
        for values, value in zip(lists.values(), one, strict=True):
            values.append(value)
    dys = [torch.randn(*lead, N).to(dtype) for N, _ in of]
    return x, dys, Layers(**lists, scaling=scaling, blocksize=blocksize)


def single(layers, i):
    """The arguments of lora_linear for layer i, without x and bias."""
    names = ("qweight", "absmax", "nested", "lora_A", "lora_B")
    numbers = dict(scaling=layers.scaling, dropout=0.0, seed=None, blocksize=layers.blocksize)
    return {name: getattr(layers, name)[i] for name in names} | numbers


def without_bias(layers):
    return [value for name, value in zip(Layers._fields, layers, strict=True) if name != "bias"]


def largest(values):
    return values.float().abs().max().item() if values.numel() else 0.0


# ---- the op


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", GROUPS, ids=str)
@pytest.mark.parametrize("tokens", [1, 10, 50])
def test_on_a_cpu_it_has_the_bits_of_single_calls(dtype, of, tokens):
    x, dys, layers = drawn_group(dtype, of, lead=(tokens,))
    ys, Ss = torch.ops.nf4lora.lora_linear_group(x, *layers)
    dx, dAs, dBs = torch.ops.nf4lora.lora_linear_group_backward(dys, x, Ss, *without_bias(layers), True)
    total = None
    for i in reversed(range(len(of))):
        y, S = torch.ops.nf4lora.lora_linear(x, bias=layers.bias[i], **single(layers, i))
        assert_same_bits(ys[i], y)
        assert_same_bits(Ss[i], S)
        one, dA, dB = torch.ops.nf4lora.lora_linear_backward(dys[i], x, S, need_dx=True, **single(layers, i))
        total = one if total is None else total + one
        assert_same_bits(dAs[i], dA)
        assert_same_bits(dBs[i], dB)
    assert_same_bits(dx, total)


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape_of_x(device, lead, dtype):
    x, _, layers = drawn_group(dtype, lead=lead)
    x, layers = _on(device, x), Layers(*_on(device, tuple(layers)))
    ys = lora_linear_group(x, layers)
    for i, y in enumerate(ys):
        expected, _ = reference.lora_linear(x, bias=layers.bias[i], **single(layers, i))
        assert y.shape == expected.shape
        torch.testing.assert_close(
            y, expected, rtol=2 * STEP[dtype], atol=2 * STEP[dtype] * max(1.0, largest(expected))
        )


def _on(device, values):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            dict(qweight=[], absmax=[], nested=[], bias=[], lora_A=[], lora_B=[]),
            ValueError,
            "a group must be of 1 to 4",
        ),
        (dict(absmax=[]), ValueError, "absmax must have as many entries as qweight, 3, got 0"),
        (dict(bias=[None]), ValueError, "bias must have as many entries as qweight, 3, got 1"),
        (dict(scaling=float("nan")), ValueError, "scaling must be finite"),
        (dict(blocksize=48), ValueError, "blocksize must be a power of two"),
    ],
)
def test_bad_lists_are_refused(change, kind, message):
    x, _, layers = drawn_group(torch.float32)
    with pytest.raises(kind, match=message):
        lora_linear_group(x, layers._replace(**change))


def test_more_layers_than_a_group_takes_are_refused():
    x, _, layers = drawn_group(torch.float32, ((8, 2),) * (MOST_SIBLINGS + 1))
    with pytest.raises(ValueError, match="a group must be of 1 to 4 layers, got 5"):
        lora_linear_group(x, layers)


def test_a_backward_call_needs_layers_of_one_input():
    x, dys, layers = drawn_group(torch.float32)
    _, Ss = torch.ops.nf4lora.lora_linear_group(x, *layers)
    for wrong, message in (
        ([dys[0], dys[1][:3], dys[2]], "dy must be"),
        ([dys[0], dys[1]], "dy must have as many entries"),
        ([dys[0], dys[1].bfloat16(), dys[2]], "dy must be float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            torch.ops.nf4lora.lora_linear_group_backward(wrong, x, Ss, *without_bias(layers), True)


def test_the_fakes_have_the_shapes_of_the_ops():
    x, dys, layers = drawn_group(torch.bfloat16, lead=(2, 3))
    torch.library.opcheck(
        torch.ops.nf4lora.lora_linear_group, (x, *layers), test_utils=("test_schema", "test_faketensor")
    )
    _, Ss = torch.ops.nf4lora.lora_linear_group(x, *layers)
    for given, S, need_dx in ((x, Ss, True), (None, Ss, True), (x, [], False), (None, [], True)):
        arguments = (dys, given, S, *without_bias(layers), need_dx)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.nf4lora.lora_linear_group_backward, arguments, test_utils=checks)


# ---- its gradient


def gradients(dtype, used, trained="AB", of_x=True, grouped=True):
    """Those of x, the A and the B, where the outputs `used` enter the loss."""
    torch.manual_seed(5)
    x, dys, layers = drawn_group(dtype)
    x.requires_grad_(of_x)
    for factors, letter in ((layers.lora_A, "A"), (layers.lora_B, "B")):
        for factor in factors:
            factor.requires_grad_(letter in trained)
    if grouped:
        ys = lora_linear_group(x, layers)
    else:
        ys = [ops.lora_linear(x, bias=layers.bias[i], **single(layers, i)) for i in range(len(QKV))]
    torch.autograd.backward([ys[i] for i in used], [dys[i] for i in used])
    return [tensor.grad for tensor in (x, *layers.lora_A, *layers.lora_B)]


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("options", [dict(), dict(trained="A"), dict(trained="B"), dict(trained=""), dict(of_x=False)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gradients_are_those_of_single_calls(dtype, used, options):
    for got, expected in zip(
        gradients(dtype, used, **options), gradients(dtype, used, **options, grouped=False), strict=True
    ):
        assert (got is None) == (expected is None)
        if got is not None:
            assert_same_bits(got, expected)


def test_a_second_derivative_is_refused_as_for_one_layer():
    x, _, layers = drawn_group(torch.float32)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(sum(y.square().sum() for y in lora_linear_group(x, layers)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# ---- csrc/cuda/lora_group.cpp, with loops in place of the launchers


@pytest.fixture
def group():
    host.library()
    yield torch.ops.nf4lora_host
    host.drop_kept()


@pytest.fixture(params=[512 << 20, 1], ids=["one_slice", "many_slices"])
def slices(request):
    with host.workspace(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("of", GROUPS, ids=str)
@pytest.mark.parametrize(
    "options",
    [dict(), dict(scaling=1.75), dict(double_quant=False, bias=False), dict(lead=(2, 3), K=512, blocksize=256)],
    ids=str,
)
def test_the_dense_group_equals_the_reference(group, dtype, of, options, slices):
    x, dys, layers = drawn_group(dtype, of, **options)
    step, scaling, K = STEP[dtype], layers.scaling, x.shape[-1]
    ys, Ss = group.group(x, *layers)
    dx, dAs, dBs = group.group_backward(dys, x, Ss, *without_bias(layers), True)
    expected_dx, through = 0.0, 0.0
    for i, (N, _) in enumerate(of):
        arguments, A, B = single(layers, i), layers.lora_A[i], layers.lora_B[i]
        y, S = reference.lora_linear(x, bias=layers.bias[i], **arguments)
        torch.testing.assert_close(Ss[i], S, rtol=step, atol=STEP[torch.float32] * largest(S))
        of_S = step * scaling * largest(S.float().abs() @ B.abs().T)  # a step of S, and half a step of the term
        torch.testing.assert_close(
            ys[i], y, rtol=step, atol=1.5 * of_S + step / 2 * 3 * bool(layers.bias[i] is not None)
        )
        one, dA, dB = reference.lora_linear_backward(dys[i], x, S, **arguments)
        expected_dx = expected_dx + one.float()
        T = (dys[i].reshape(-1, N).float() @ B).abs()
        through += 1.5 * step * scaling * largest(T @ A.abs()) + step / 2 * largest(one)
        torch.testing.assert_close(
            dAs[i], dA, rtol=1e-5, atol=step * scaling * largest(T.T @ x.reshape(-1, K).float().abs())
        )
        torch.testing.assert_close(
            dBs[i],
            dB,
            rtol=1e-5,
            atol=step * scaling * largest(dys[i].reshape(-1, N).float().abs().T @ S.float().abs()),
        )
    torch.testing.assert_close(dx.float(), expected_dx, rtol=step, atol=through)


def test_what_the_layers_share_is_launched_once(group):
    x, dys, layers = drawn_group(torch.bfloat16)
    launches()
    _, Ss = group.group(x, *layers)
    assert launches() == ["tall_skinny", *["lora_slice"] * 3]
    group.group_backward(dys, x, Ss, *without_bias(layers), True)
    assert launches() == [*["tall_skinny"] * 4, "expand", *["lora_slice"] * 3]
    _, Ss = group.group(x, *layers._replace(scaling=1.75))  # no power of two: the low-rank terms are written first
    assert launches() == ["tall_skinny", *["expand", "lora_slice"] * 3]
    group.group_backward(dys, None, Ss, *without_bias(layers), True)
    assert launches() == [*["tall_skinny"] * 3, "expand", *["lora_slice"] * 3]
    dx, dAs, dBs = group.group_backward(dys, x, [], *without_bias(layers), False)
    assert launches() == ["tall_skinny"] * 4
    assert dx.shape == dBs[0].shape == (0,)
    assert [dA.shape for dA in dAs] == [A.shape for A in layers.lora_A]


@pytest.mark.parametrize("scaling", [2.0, 1.75])
def test_every_W_that_is_kept_is_not_unpacked_again(group, scaling):
    x, dys, layers = drawn_group(torch.bfloat16, scaling=scaling)
    ys, Ss = group.group(x, *layers)
    expected, *_ = group.group_backward(dys, x, Ss, *without_bias(layers), True)
    host.keep_next()
    again, _ = group.group(x, *layers)
    for y, other in zip(ys, again, strict=True):
        assert_same_bits(y, other)
    launches()
    got, *_ = group.group_backward(dys, x, Ss, *without_bias(layers), True)
    assert "lora_slice" not in launches()
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-9 * largest(expected))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, dict()), (torch.bfloat16, dict(of=((20, 4), (32, 4)))), (torch.bfloat16, dict(lead=(0,)))],
    ids=str,
)
def test_what_the_dense_group_does_not_take(group, dtype, options):
    x, _, layers = drawn_group(dtype, **options)
    with pytest.raises(ValueError, match="not one group"):
        group.group(x, *layers)


def test_strides_and_places_of_the_arguments_do_not_matter(group, slices):
    x, dys, layers = drawn_group(torch.bfloat16)
    ys, Ss = group.group(x, *layers)
    expected = group.group_backward(dys, x, Ss, *without_bias(layers), True)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)  # off a multiple of 16 bytes
    dys = [torch.stack([dy, dy], dim=2)[..., 0] for dy in dys]
    changed = layers._replace(lora_A=[A.T.contiguous().T for A in layers.lora_A])
    again, _ = group.group(shifted, *changed)
    for y, other in zip(ys, again, strict=True):
        assert_same_bits(y, other)
    got = group.group_backward(dys, shifted, Ss, *without_bias(changed), True)
    for ours, theirs in zip(
        torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert_same_bits(ours, theirs)
