"""nf4_quantize and nf4_dequantize: bytes, rounding, properties, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf4lora import _C, ops
from nf4lora.ops import reference

from support.bits import assert_same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
HALF_STEP = max(b - a for a, b in zip(_C.CODE, _C.CODE[1:])) / 2
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

# Mean absolute error of the round trip of N(0, 1), published by bitsandbytes (tests/test_functional.py,
# test_4bit_quant: mean over 200 samples of 1024 x 1024).
PUBLISHED_ERROR = {
    32: 0.067746, 64: 0.072798, 128: 0.076831, 256: 0.080337,
    512: 0.083547, 1024: 0.086610, 2048: 0.089592, 4096: 0.092547,
}  # fmt: skip


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.cpu().view(BITS[a.dtype]), b.cpu().view(BITS[b.dtype]))


def normal_quantiles():
    """NF4 as the paper derives it: quantiles of N(0, 1), scaled to [-1, 1]."""
    tail = 0.9677083  # (1 - 1/(2*15) + 1 - 1/(2*16)) / 2
    positive = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return values / values[-1]


def test_code_is_the_papers():
    # 2e-7: the stored table was rounded to float32 along the way.
    torch.testing.assert_close(torch.tensor(_C.CODE, dtype=torch.float64), normal_quantiles(), atol=2e-7, rtol=0)
    assert_same_bits(torch.tensor(_C.CODE), reference.CODE)


def test_first_of_a_pair_is_the_high_nibble():
    weight = torch.zeros(64)
    weight[0], weight[1], weight[2] = -1.0, 1.0, 0.0
    qweight, _ = ops.nf4_quantize(weight)
    assert qweight[0] == 0x0F  # code 0 for -1, then code 15 for 1
    assert qweight[1] == 0x77  # zeros are code 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bytes_and_values_match_the_reference(instruction_set, dtype, blocksize):
    weight = (torch.randn(3, 2 * blocksize) * 0.02).to(dtype)
    weight[0, :blocksize] = 0
    weight[1, :blocksize] *= 1e-5  # subnormal in float16
    qweight, absmax = ops.nf4_quantize(weight, blocksize)
    expected_qweight, expected_absmax = reference.nf4_quantize(weight, blocksize)
    assert_same_bits(absmax, expected_absmax)
    assert_same_bits(qweight, expected_qweight)
    for out in DTYPES:
        got = ops.nf4_dequantize(qweight, absmax, blocksize, out)
        assert same_bits(got, reference.nf4_dequantize(qweight, absmax, blocksize, out))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 192), (2, 3, 5, 128), (0, 64), (4, 0), (100003, 32)], ids=str)
def test_any_leading_shape(device, shape):
    blocksize = 32
    weight = torch.randn(shape)
    qweight, absmax = ops.nf4_quantize(weight.to(device), blocksize)
    assert qweight.shape == (*shape[:-1], shape[-1] // 2)
    assert absmax.shape == (*shape[:-1], shape[-1] // blocksize)
    expected = reference.nf4_quantize(weight, blocksize)
    assert_same_bits(qweight.cpu(), expected[0])
    assert_same_bits(absmax.cpu(), expected[1])
    assert ops.nf4_dequantize(qweight, absmax, blocksize).shape == shape


def test_strides_do_not_matter(device):
    wide = torch.randn(96, 256, device=device)
    for view in (wide.t()[:, :64], wide[:, ::2], wide[::3, 64:128], wide.flip(0)):
        contiguous = view.contiguous()
        assert all(map(torch.equal, ops.nf4_quantize(view, 32), ops.nf4_quantize(contiguous, 32)))
    qweight, absmax = ops.nf4_quantize(wide)
    got = ops.nf4_dequantize(qweight[::2], absmax[::2])
    assert_same_bits(got, ops.nf4_dequantize(qweight, absmax)[::2])


def test_ties_take_the_lower_code(instruction_set):
    midpoints = [(a + b) / 2 for a, b in zip(reference.CODE, reference.CODE[1:])]
    weight = torch.tensor([1.0, *midpoints, *[0.0] * 16])
    above = torch.nextafter(weight, torch.tensor(2.0))
    above[0] = 1.0
    codes = torch.stack([(q := ops.nf4_quantize(weight, 32)[0]) >> 4, q & 15], 1).flatten()
    codes_above = torch.stack([(q := ops.nf4_quantize(above, 32)[0]) >> 4, q & 15], 1).flatten()
    assert codes[1:16].tolist() == list(range(15))
    assert codes_above[1:16].tolist() == list(range(1, 16))


def test_subnormal_blocks_are_clamped_like_bitsandbytes(instruction_set):
    weight = torch.tensor([1e-40, -1e-40, 5e-39, 0.0] * 8)
    qweight, absmax = ops.nf4_quantize(weight, 32)
    expected = reference.nf4_quantize(weight, 32)
    assert_same_bits(qweight, expected[0])
    assert absmax.item() == weight.abs().max().item()


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 8),
    blocksize=st.sampled_from([32, 64, 256]),
    exponent=st.integers(-60, 60),
)
def test_properties(device, seed, rows, blocksize, exponent):
    weight = torch.randn(rows, blocksize, generator=torch.Generator().manual_seed(seed)).to(device)
    qweight, absmax = ops.nf4_quantize(weight, blocksize)
    restored = ops.nf4_dequantize(qweight, absmax, blocksize, torch.float32)
    # No weight moves by more than half the widest gap between two codes.
    assert ((restored - weight).abs() <= absmax * (HALF_STEP + 1e-6)).all()
    # Quantising what was restored changes nothing.
    assert all(map(torch.equal, ops.nf4_quantize(restored, blocksize), (qweight, absmax)))
    # A power of two scales absmax and leaves the codes alone.
    again, scaled = ops.nf4_quantize(weight * 2.0**exponent, blocksize)
    assert_same_bits(again, qweight)
    assert_same_bits(scaled, absmax * 2.0**exponent)
    # A block knows nothing of its neighbours.
    assert_same_bits(ops.nf4_quantize(weight.flip(0), blocksize)[0], qweight.flip(0))


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=64, max_size=64),
    dtype=st.sampled_from(DTYPES),
)
def test_any_finite_block(instruction_set, values, dtype):
    weight = torch.tensor(values).to(dtype)
    weight = torch.where(weight.isfinite(), weight, torch.zeros((), dtype=dtype))
    qweight, absmax = ops.nf4_quantize(weight)
    expected = reference.nf4_quantize(weight)
    assert_same_bits(qweight, expected[0])
    assert_same_bits(absmax, expected[1])
    for out in DTYPES:
        assert same_bits(ops.nf4_dequantize(qweight, absmax, dtype=out), reference.nf4_dequantize(*expected, dtype=out))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_error_is_the_published_one(blocksize):
    weight = torch.randn(1024, 4096)
    error = (ops.nf4_dequantize(*ops.nf4_quantize(weight, blocksize), blocksize, torch.float32) - weight).abs().mean()
    # Four samples of the published size: their mean spreads by half of one sample's 0.000074; this is six of those.
    assert math.isclose(error.item(), PUBLISHED_ERROR[blocksize], abs_tol=0.00022)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bytes_are_those_of_bitsandbytes(dtype, blocksize):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = (torch.randn(8, 4096) * 0.05).to(dtype)
    weight[0] = 0
    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    qweight, absmax = ops.nf4_quantize(weight, blocksize)
    assert_same_bits(qweight.flatten(), packed.flatten())
    assert_same_bits(absmax.flatten(), state.absmax)
    for out in DTYPES:
        state.dtype = out
        assert_same_bits(ops.nf4_dequantize(qweight, absmax, blocksize, out), functional.dequantize_4bit(packed, state))


def test_out_is_written_and_returned(device):
    qweight, absmax = ops.nf4_quantize(torch.randn(4, 128, device=device))
    out = torch.full((4, 128), float("nan"), device=device, dtype=torch.float16)
    assert ops.nf4_dequantize(qweight, absmax, out=out) is out
    assert_same_bits(out, ops.nf4_dequantize(qweight, absmax, dtype=torch.float16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_refused_with_its_place(device, bad, dtype):
    weight = torch.randn(4, 128).to(dtype)
    weight[2, 70] = bad
    with pytest.raises(ValueError, match=r"^nf4_quantize: weight must be finite, got NaN or Inf in block 5 \(flat ele"):
        ops.nf4_quantize(weight.to(device))


@pytest.mark.parametrize(
    ("weight", "blocksize", "error", "message"),
    [
        (torch.zeros(64, dtype=torch.int32), 64, TypeError, "weight must be float32, bfloat16 or float16, got int32"),
        (torch.zeros(64, dtype=torch.float64), 64, TypeError, "weight must be .*, got float64"),
        (torch.zeros(64), 48, ValueError, "blocksize must be a power of two between 32 and 4096, got 48"),
        (torch.zeros(64), 16, ValueError, "blocksize must be .* got 16"),
        (torch.zeros(8192), 8192, ValueError, "blocksize must be .* got 8192"),
        (torch.zeros(2, 65), 64, ValueError, r"the last dimension of weight must be a multiple of .*\[2, 65\]"),
        (torch.zeros(()), 64, ValueError, "the last dimension of weight"),
    ],
)
def test_quantize_says_what_is_wrong(device, weight, blocksize, error, message):
    with pytest.raises(error, match=f"^nf4_quantize: {message}"):
        ops.nf4_quantize(weight.to(device), blocksize)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qweight": torch.zeros(2, 32)}, TypeError, "qweight must be uint8, got float32"),
        ({"absmax": torch.zeros(2, 1, dtype=torch.uint8)}, TypeError, "absmax must be float32, got uint8"),
        ({"absmax": torch.zeros(3)}, ValueError, r"absmax must hold 2 values \(one per 64 weights\), got shape \[3\]"),
        ({"blocksize": 63}, ValueError, "blocksize must be"),
        ({"blocksize": 128}, ValueError, "the last dimension of qweight must be a multiple of blocksize / 2 = 64"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32, bfloat16 or float16, got int8"),
        ({"out": torch.zeros(2, 63)}, ValueError, r"out must have the shape of qweight .*, got \[2, 63\]"),
        ({"out": torch.zeros(64, 2).t()}, ValueError, "out must be contiguous"),
        ({"out": torch.zeros(2, 64, dtype=torch.float64)}, TypeError, "dtype must be .*, got float64"),
    ],
)
def test_dequantize_says_what_is_wrong(change, error, message):
    arguments = {"qweight": torch.zeros(2, 32, dtype=torch.uint8), "absmax": torch.ones(2, 1), **change}
    with pytest.raises(error, match=f"^nf4_dequantize: {message}"):
        ops.nf4_dequantize(**arguments)


def test_two_devices_are_refused():
    qweight, absmax = ops.nf4_quantize(torch.ones(64))
    with pytest.raises(ValueError, match=r"^nf4_dequantize: absmax must be on the device of the first argument"):
        torch.ops.nf4lora.nf4_dequantize.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), qweight, absmax.to("meta"), 64, torch.float32
        )


def test_opcheck(device):
    weight = torch.randn(4, 128, device=device)
    qweight, absmax = ops.nf4_quantize(weight)
    torch.library.opcheck(torch.ops.nf4lora.nf4_quantize.default, (weight, 64))
    torch.library.opcheck(torch.ops.nf4lora.nf4_dequantize.default, (qweight, absmax, 64, torch.bfloat16))
    torch.library.opcheck(
        torch.ops.nf4lora.nf4_dequantize.out, (qweight, absmax, 64), {"out": torch.empty_like(weight)}
    )


def test_errors_keep_their_kind_and_text_when_compiled():
    compiled = torch.compile(ops.nf4_quantize, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="^nf4_quantize: blocksize must be a power of two"):
        compiled(torch.zeros(64), 48)
    with pytest.raises(TypeError, match="^nf4_quantize: weight must be float32"):
        compiled(torch.zeros(64, dtype=torch.float64))
