"""lora_linear with slices of W, called directly on CPU tensors."""

import math

import pytest
import torch

from nf4lora import ops
from nf4lora.ops import reference
from nf4lora.ops.kernels import sliced

from support.bits import assert_same_bits
from support.torch_kernels import RANK as R
from support.torch_kernels import assert_makes_no_dx, assert_refuses_as_others, drawn_layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Distance of two neighbours of the dtype, relative to the smaller; of float32 what sums in another order differ by.
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
M, N, K = 10, 200, 320


def layer(dtype, N=N, K=K, **options):
    return drawn_layer(dtype, N, K, **options)


def packed_of(arguments):
    return sliced.Packed(*(arguments[name] for name in sliced.Packed._fields))


def assert_near(got, expected, dtype, through=0.0):
    """One step of the dtype; `through`: what intermediate results, which have 16 bits too, add to that."""
    assert got.dtype == expected.dtype
    atol = STEP[torch.float32] * largest(expected) + through
    torch.testing.assert_close(got, expected, rtol=STEP[dtype], atol=atol)


def largest(values):
    return values.float().abs().max().item() if values.numel() else 0.0


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
        dict(dropout=0.25), dict(dropout=0.9, double_quant=False, blocksize=32, K=480), dict(blocksize=32),
        dict(blocksize=256, K=512, lead=(2, 3)), dict(N=24, K=32, blocksize=32), dict(lead=()), dict(lead=(0,)),
        dict(lead=(2, 0), dropout=0.5), dict(lead=(0, 3), lora=False, bias=False),
    ],
    ids=str,
)  # fmt: skip
def test_equals_the_reference(dtype, options, slices):
    x, dy, arguments, bias = layer(dtype, **options)
    N, K = dy.shape[-1], x.shape[-1]
    A, B, scaling = arguments["lora_A"], arguments["lora_B"], arguments["scaling"]
    step, keep = STEP[dtype], 1.0 - arguments["dropout"]
    y, S = sliced.lora_linear(x, bias=bias, **arguments)
    expected_y, expected_S = reference.lora_linear(x, bias=bias, **arguments)
    assert_near(S, expected_S, dtype)
    # S may be a step away; its term and the bias are rounded before W's product is added, by half a step of themselves.
    first, through = torch.zeros(1, N), 0.0
    if A is not None:
        first = scaling * expected_S.float() @ B.T
        through = step * scaling * largest(S.float().abs() @ B.abs().T)
    if bias is not None:
        first = first + bias
    assert_near(y, expected_y, dtype, through + step / 2 * largest(first))

    dx, dA, dB = sliced.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    expected_dx, expected_dA, expected_dB = reference.lora_linear_backward(dy, x, S, **arguments)
    if A is None:
        assert dA.shape == dB.shape == (0,)
        assert_near(dx, expected_dx, dtype)
        return
    T = (dy.reshape(-1, N).float() @ B).abs()  # a step away as S is; dx's term is rounded by half a step once more
    assert_near(dx, expected_dx, dtype, 1.5 * step * scaling / keep * largest(T @ A.abs()))
    assert_near(dA, expected_dA, A.dtype, step * scaling / keep * largest(T.T @ x.reshape(-1, K).float().abs()))
    assert_near(dB, expected_dB, B.dtype)


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


@pytest.mark.parametrize("nbytes", [0, 64, 8192, 28672, 2**20])
@pytest.mark.parametrize("length", [0, 1, 64, 65, 200, 4096, 11008, 14336, 28672, 128256])
def test_parts_are_few_and_about_equal(length, nbytes):
    parts = sliced._parts(length, nbytes)
    assert [p.start for p in parts] + [length] == [0] + [p.stop for p in parts]
    sizes, most = [p.stop - p.start for p in parts], max(64, sliced.SLICE_BYTES // max(nbytes, 1) // 64 * 64)
    assert all(0 < size <= most for size in sizes)
    assert all(size == sizes[0] and size % 64 == 0 for size in sizes[:-1])
    assert len(parts) <= math.ceil(length / most)
    assert all(size < length / math.ceil(length / most) + 64 for size in sizes[:1])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_a_part_of_W_is_that_of_nf4_dequantize(blocksize, double_quant):
    _, _, arguments, _ = layer(torch.float32, blocksize=blocksize, K=4096, N=9, double_quant=double_quant)
    packed = packed_of(arguments)
    scales = ops.absmax_dequantize(packed.absmax, packed.nested) if double_quant else packed.absmax
    for dtype in DTYPES:
        W, out = ops.nf4_dequantize(packed.qweight, scales, blocksize, dtype), torch.empty(5, 96, dtype=dtype)
        sliced.unpack(packed, sliced.Rectangle(slice(2, 7), slice(1056, 1152)), out)
        assert_same_bits(out, W[2:7, 1056:1152])


def test_slices_share_one_buffer():
    _, _, arguments, _ = layer(torch.bfloat16)
    rectangles = [sliced.Rectangle(slice(n, min(n + 64, N)), slice(0, K)) for n in range(0, N, 64)]
    parts = list(sliced.unpacked(packed_of(arguments), rectangles, torch.empty(0, dtype=torch.bfloat16)))
    assert [rectangle for rectangle, _ in parts] == rectangles
    assert len({W.data_ptr() for _, W in parts}) == 1
    assert list(sliced.unpacked(packed_of(arguments), [], torch.empty(0))) == []


@pytest.mark.parametrize(
    ("N", "K"),
    [(4096, 14336), (18944, 3584), (11008, 4096), (2048, 5632), (28672, 8192), (8192, 28672), (128256, 2048)],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_layer_of_a_large_model_is_one_slice(N, K, direction):
    length, other = (N, K) if direction == "forward" else (K, N)
    assert len(sliced._parts(length, other * 2)) == 1


def test_what_is_larger_than_a_slice_is_cut(monkeypatch):
    assert len(sliced._parts(128256, 8192 * 2)) == 4  # 2.1 GB in 16 bits


def test_without_rows_W_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(sliced, "unpack", lambda *_: pytest.fail("W was unpacked"))
    x, dy, arguments, bias = layer(torch.bfloat16, lead=(0,))
    _, S = sliced.lora_linear(x, bias=bias, **arguments)
    sliced.lora_linear_backward(dy, x, S, need_dx=True, **arguments)


@pytest.mark.parametrize("lora", [True, False])
def test_without_out_features_the_gradient_is_zero(lora, slices):
    x, dy, arguments, _ = layer(torch.bfloat16, N=0, lora=lora, lead=(2, 3))
    y, S = sliced.lora_linear(x, bias=None, **arguments)
    dx, dA, dB = sliced.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    assert y.shape == (2, 3, 0)
    assert dx.shape == x.shape
    assert not dx.any()
    assert (dA.shape, dB.shape) == (((R, K), (0, R)) if lora else ((0,), (0,)))
    assert not dA.any()


def test_the_packed_weight_is_made_contiguous_once(monkeypatch, slices):
    x, _, arguments, _ = layer(torch.bfloat16)
    arguments["qweight"] = arguments["qweight"].T.contiguous().T
    unpack, seen = sliced.unpack, []
    monkeypatch.setattr(sliced, "unpack", lambda p, r, out: (seen.append(p.qweight), unpack(p, r, out)))
    sliced.lora_linear(x, bias=None, **arguments)
    assert seen[0].is_contiguous()
    assert {q.data_ptr() for q in seen} == {seen[0].data_ptr()}


def test_strides_of_the_arguments_do_not_matter(slices):
    x, dy, arguments, bias = layer(torch.float32)
    y, S = sliced.lora_linear(x, bias=bias, **arguments)
    expected = sliced.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    x, dy = x.T.contiguous().T, torch.stack([dy, dy], dim=2)[..., 0]
    for name in ("qweight", "absmax"):
        arguments[name] = torch.stack([arguments[name]] * 2, dim=2)[..., 0]
    assert_same_bits(sliced.lora_linear(x, bias=bias, **arguments)[0], y)
    got = sliced.lora_linear_backward(dy, x, S, need_dx=True, **arguments)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("share", [0.0003, 0.001, 0.01])
def test_a_small_adapter_is_not_lost_in_the_rounding_of_y(share, slices):
    # Far below a last place of y, a change is lost or becomes a whole one: on average it arrives. Added to a rounded
    # y, none of it would.
    x, _, arguments, _ = layer(torch.bfloat16, lead=(256,))
    B = arguments.pop("lora_B")
    y = sliced.lora_linear(x, bias=None, lora_B=torch.zeros_like(B), **arguments)[0].double()
    S = sliced.lora_linear(x, bias=None, lora_B=B, **arguments)[1].double()
    B = (B * (share * y.norm() / (1.75 * S @ B.double().T).norm())).bfloat16().float()
    term = 1.75 * S @ B.double().T
    got = sliced.lora_linear(x, bias=None, lora_B=B, **arguments)[0].double()
    arrived = ((got - y) * term).sum() / term.norm() ** 2
    # Two roundings to steps of y, independent at worst: variance 1/12 each. The term's own rounding is 2^-8 of it.
    steps = torch.exp2(torch.frexp(y).exponent.double() - 8)
    noise = (steps * term).norm() / 6**0.5 / term.norm() ** 2
    assert abs(arrived - 1.0) < 5 * noise + 2**-8, (arrived, noise)


def test_dx_is_not_made_unless_wanted(monkeypatch):
    monkeypatch.setattr(sliced, "unpack", lambda *_: pytest.fail("W was unpacked"))
    assert_makes_no_dx(sliced, torch.bfloat16, N, K)


def test_arguments_are_checked_in_the_words_of_the_other_kernels():
    assert_refuses_as_others(sliced)
