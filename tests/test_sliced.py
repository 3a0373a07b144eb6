"""lora_linear with slices of W, called directly on CPU tensors; streams and the kernel that unpacks need a card."""

import pytest
import torch

from nf4lora import ops, reference, sliced

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Both sides sum in float32, in another order. In 16 bits the low-rank term is rounded once more, to its own last place.
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
M, N, K, R = 10, 200, 320, 4


def layer(dtype, *, bias=True, lora=True, double_quant=True, dropout=0.0, blocksize=64, lead=(M,)):
    """x, dy, and the arguments that forward and backward share."""
    x, dy = torch.randn(*lead, K).to(dtype), torch.randn(*lead, N).to(dtype)
    qweight, absmax = ops.nf4_quantize(torch.randn(N, K) / K**0.5, blocksize)
    nested = None
    if double_quant:
        absmax, nested = ops.absmax_quantize(absmax)
    A, B = (torch.randn(R, K) / K**0.5, torch.randn(N, R)) if lora else (None, None)
    seed = torch.tensor([-(2**40) - 12345]) if dropout else None
    arguments = dict(qweight=qweight, absmax=absmax, nested=nested, lora_A=A, lora_B=B)
    arguments |= dict(scaling=1.75, dropout=dropout, seed=seed, blocksize=blocksize)
    return x, dy, arguments, torch.randn(N).to(dtype) if bias else None


def assert_near(got, expected, dtype, steps=2):
    """`steps` last places of the largest value: sums of hundreds of values of its size, and two roundings."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.numel():
        worst = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-6)
        assert worst <= steps * STEP[dtype], worst


@pytest.fixture(params=[sliced.SLICE_BYTES, 1], ids=["one_slice", "many_slices"])
def slices(request, monkeypatch):
    """The size of a slice; 1 byte makes the smallest that there are."""
    monkeypatch.setattr(sliced, "SLICE_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(bias=False), dict(lora=False), dict(lora=False, bias=False), dict(double_quant=False),
        dict(dropout=0.3), dict(blocksize=32), dict(lead=(2, 3)), dict(lead=(0,)),
    ],
    ids=str,
)  # fmt: skip
def test_equals_the_reference(dtype, options, slices):
    x, dy, arguments, bias = layer(dtype, **options)
    y, S = sliced.lora_linear(x, bias=bias, **arguments)
    expected_y, expected_S = reference.lora_linear(x, bias=bias, **arguments)
    assert_near(S, expected_S, dtype)
    assert_near(y, expected_y, dtype)
    dx, dA, dB = sliced.lora_linear_backward(dy, x, expected_S, need_dx=True, **arguments)
    expected = reference.lora_linear_backward(dy, x, expected_S, **arguments)
    assert_near(dx, expected[0], dtype)
    if arguments["lora_A"] is not None:
        assert_near(dA, expected[1], dtype)
        assert_near(dB, expected[2], dtype)


def test_W_is_never_whole(monkeypatch):
    monkeypatch.setattr(sliced, "SLICE_BYTES", 64 * K * 2)
    x, dy, arguments, _ = layer(torch.bfloat16)
    unpack, shapes = sliced.unpack, []
    monkeypatch.setattr(sliced, "unpack", lambda p, r, out: (shapes.append(out.shape), unpack(p, r, out)))
    _, S = sliced.lora_linear(x, bias=None, **arguments)
    assert [tuple(shape) for shape in shapes] == [(64, K)] * 3 + [(8, K)]
    shapes.clear()
    sliced.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    assert [tuple(shape) for shape in shapes] == [(N, 64)] * 5


def test_a_small_adapter_is_not_lost_in_the_rounding_of_y():
    # A term of a tenth of y's last place moves an eighth of the values or so by a whole one: on average it arrives.
    # Added to a rounded y, none of it would.
    x, _, arguments, _ = layer(torch.bfloat16, lead=(64,))
    base, _ = sliced.lora_linear(x, bias=None, **{**arguments, "scaling": 0.0})
    term = reference.lora_linear(x, **{**arguments, "scaling": 1.0}, acc=torch.float64)[0].double()
    term -= reference.lora_linear(x, **{**arguments, "scaling": 0.0}, acc=torch.float64)[0].double()
    y, _ = sliced.lora_linear(x, bias=None, **{**arguments, "scaling": 2**-11})
    arrived = ((y.double() - base.double()) * term).sum() / (term * term).sum() * 2**11
    assert 0.7 < arrived < 1.3, arrived


def test_dx_is_not_made_unless_wanted(monkeypatch):
    x, dy, arguments, _ = layer(torch.bfloat16)
    monkeypatch.setattr(sliced, "unpack", lambda *_: pytest.fail("W was unpacked"))
    dx, dA, dB = sliced.lora_linear_backward(dy, x, torch.ones(M, R).bfloat16(), need_dx=False, **arguments)
    assert dx.shape == (0,) and (dA.shape, dB.shape) == ((R, K), (N, R)) and dA.any() and dB.any()


def test_arguments_are_checked_in_the_words_of_the_other_kernels():
    x, dy, arguments, bias = layer(torch.float32, dropout=0.1)
    bad = {**arguments, "seed": None}
    with pytest.raises(ValueError, match="lora_linear: dropout > 0 needs a seed, got None"):
        sliced.lora_linear(x, bias=bias, **bad)
    with pytest.raises(ValueError, match="lora_linear_backward: dropout > 0 needs a seed, got None"):
        sliced.lora_linear_backward(dy, x, x.new_empty(M, R), need_dx=True, **bad)
