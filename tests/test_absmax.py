"""absmax_quantize and absmax_dequantize: double quantisation of the scales."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf4lora import _C, ops
from nf4lora.ops import reference

from conftest import KNOWN_SETS
from support.absmax_claims import *  # noqa: F403  the tests that every device shares
from support.bits import assert_same_bits

# SHA-256 of the 256 float32 values of bitsandbytes' create_dynamic_map(signed=True).
MAP_DIGEST = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


class OnTheCpu:
    """The ops on one instruction set, which each call forces and gives back."""

    def __init__(self, name):
        self.name = name

    def forced(self, op, *arguments):
        before = _C.cpu_instruction_set()
        _C.force_cpu_instruction_set(self.name)
        try:
            return op(*arguments)
        finally:
            _C.force_cpu_instruction_set(before)

    def quantize(self, absmax):
        return self.forced(ops.absmax_quantize, absmax)

    def dequantize(self, absmax_q, nested):
        return self.forced(ops.absmax_dequantize, absmax_q, nested)


class OnTheGpu:
    def quantize(self, absmax):
        return tuple(tensor.cpu() for tensor in ops.absmax_quantize(absmax.cuda()))

    def dequantize(self, absmax_q, nested):
        return ops.absmax_dequantize(absmax_q.cuda(), nested.cuda()).cpu()


@pytest.fixture(scope="module", params=[*KNOWN_SETS, pytest.param("cuda", marks=pytest.mark.gpu)])
def absmax_ops(request):
    if request.param == "cuda":
        return OnTheGpu() if torch.cuda.is_available() else pytest.skip("no CUDA device")
    if request.param not in _C.cpu_instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    return OnTheCpu(request.param)


def test_map_is_that_of_bitsandbytes():
    code = torch.tensor(_C.NESTED_CODE)
    assert hashlib.sha256(code.numpy().tobytes()).hexdigest() == MAP_DIGEST
    assert_same_bits(code, reference.nested_code())
    assert code[127] == 0


@pytest.mark.parametrize("count", [0, 1, 2, 255, 256, 257, 1000, 100_000])
def test_matches_the_reference(instruction_set, count):
    absmax = torch.rand(count) * 0.1 + 0.01
    got, expected = ops.absmax_quantize(absmax), reference.absmax_quantize(absmax)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1])
    assert_same_bits(ops.absmax_dequantize(*got), reference.absmax_dequantize(*expected))


@pytest.mark.parametrize("shape", [(3, 100), (2, 3, 50), (0, 5), (1,)], ids=str)
def test_shape_is_kept_and_strides_do_not_matter(device, shape):
    absmax = torch.rand(shape)
    absmax_q, nested = ops.absmax_quantize(absmax.to(device))
    assert absmax_q.shape == shape
    assert nested.shape == (-(-absmax.numel() // 256) + 1,)
    assert ops.absmax_dequantize(absmax_q, nested).shape == shape
    if absmax.dim() == 2 and absmax.numel():
        transposed = ops.absmax_quantize(absmax.to(device).t())[0]
        assert_same_bits(transposed.cpu(), reference.absmax_quantize(absmax.t().contiguous())[0])


def test_equal_scales_are_exact(device):
    absmax = torch.full((300,), 0.37, device=device)
    absmax_q, nested = ops.absmax_quantize(absmax)
    assert (absmax_q == 127).all()
    assert (nested[:-1] == 0).all()
    assert_same_bits(ops.absmax_dequantize(absmax_q, nested), absmax)


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=600))
def test_any_scales(instruction_set, values):
    absmax = torch.tensor(values)
    got, expected = ops.absmax_quantize(absmax), reference.absmax_quantize(absmax)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1])


def test_error_stays_below_half_the_widest_gap(device):
    absmax = torch.rand(1000, device=device)
    absmax_q, nested = ops.absmax_quantize(absmax)
    scale = nested[:-1].repeat_interleave(256)[:1000]
    widest = max(b - a for a, b in zip(_C.NESTED_CODE, _C.NESTED_CODE[1:]))
    assert ((ops.absmax_dequantize(absmax_q, nested) - absmax).abs() <= scale * (widest / 2 + 1e-6)).all()


def test_decoding_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(64, 1024).bfloat16()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    nested = torch.cat([state.state2.absmax, state.offset.reshape(1)])
    absmax = ops.absmax_dequantize(state.absmax, nested)
    got = ops.nf4_dequantize(packed.reshape(64, 512), absmax.reshape(64, 16))
    assert_same_bits(got, functional.dequantize_4bit(packed, state))


def test_codes_are_nearer_than_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(1024, 1024)
    _, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    exact = ops.nf4_quantize(weight)[1].flatten()
    absmax_q, nested = ops.absmax_quantize(exact)
    # Its encoder looks values up in 65,536 bins, so up to 0.5 % of its codes are not the nearest.
    assert (absmax_q != state.absmax).float().mean() < 0.005
    theirs = ops.absmax_dequantize(state.absmax, torch.cat([state.state2.absmax, state.offset.reshape(1)]))
    ours = ops.absmax_dequantize(absmax_q, nested)
    assert (ours - exact).abs().sum() <= (theirs - exact).abs().sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(device, bad):
    absmax = torch.ones(300, device=device)
    absmax[290] = bad
    with pytest.raises(ValueError, match="^absmax_quantize: absmax must be finite, got NaN or Inf"):
        ops.absmax_quantize(absmax)


HUGE = torch.tensor(3.4e38).item()  # a float32


@pytest.mark.parametrize("count", [2, 300, 700])
def test_scales_too_far_apart_for_float32_are_refused(device, count, instruction_set):
    """The mean of these is about -1.1e38, from which the positive ones are 4.5e38 away: no float32 holds that."""
    absmax = torch.full((count,), -HUGE)
    absmax[1::3] = HUGE
    absmax[-1] = HUGE
    absmax[:2] = torch.tensor([-HUGE, HUGE / 2])  # of two, neither lies too far away
    if count == 2:
        got, expected = ops.absmax_quantize(absmax.to(device)), reference.absmax_quantize(absmax)
        assert_same_bits(got[0].cpu(), expected[0])
        assert_same_bits(got[1].cpu(), expected[1])
        return
    with pytest.raises(ValueError) as expected:
        reference.absmax_quantize(absmax)
    with pytest.raises(ValueError) as caught:
        ops.absmax_quantize(absmax.to(device))
    assert str(caught.value) == str(expected.value)
    assert str(caught.value).startswith(
        "absmax_quantize: absmax must lie within 3.4e38 of its mean, got values further"
    )


@given(st.lists(st.floats(-HUGE, HUGE, width=32) | st.sampled_from([-HUGE, HUGE]), min_size=1, max_size=300))
def test_scales_of_both_signs_are_quantised_or_refused_as_the_reference_does(instruction_set, values):
    absmax = torch.tensor(values)
    got, expected = (what_becomes_of(absmax, each) for each in (ops, reference))
    if isinstance(expected, str):
        assert got == expected
    else:
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])
        assert got[1].isfinite().all()


def what_becomes_of(absmax, module):
    try:
        return module.absmax_quantize(absmax)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.absmax_quantize(torch.ones(3).bfloat16()), TypeError, "absmax_quantize: absmax must be float32"),
        (
            lambda: ops.absmax_dequantize(torch.zeros(300, dtype=torch.uint8), torch.zeros(2)),
            ValueError,
            r"absmax_dequantize: nested must hold 3 values \(one per 256 absmax, and the offset\), got shape \[2\]",
        ),
        (lambda: ops.absmax_dequantize(torch.zeros(3), torch.zeros(2)), TypeError, "absmax_dequantize: absmax must be"),
        (
            lambda: ops.absmax_dequantize(torch.zeros(3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)),
            TypeError,
            "absmax_dequantize: nested must be float32, got int32",
        ),
    ],
)
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_opcheck(device):
    absmax = torch.rand(300, device=device)
    torch.library.opcheck(torch.ops.nf4lora.absmax_quantize.default, (absmax,))
    torch.library.opcheck(torch.ops.nf4lora.absmax_dequantize.default, ops.absmax_quantize(absmax))


def test_nearest_is_right_at_every_midpoint_and_wherever_the_search_changes_its_mind(instruction_set):
    # Pairs of v and -v keep the mean at zero, and a 1 in each block the scale at one: v is looked up as it is.
    code = reference.nested_code()
    midpoints = (code[1:] + code[:-1]) / 2
    powers = 2.0 ** torch.arange(-30, 1)
    edges = (powers[:, None] * (1 + torch.arange(128) / 128)).flatten()  # where upper bits of a float32 change
    exact = torch.cat([midpoints.abs(), edges[edges <= 1]])
    up, down = torch.full(exact.shape, torch.inf), torch.full(exact.shape, -torch.inf)
    values = torch.cat([exact, exact.nextafter(up), exact.nextafter(down)]).clamp(max=1)
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 127)).reshape(-1, 127)
    blocks = torch.nn.functional.pad(blocks, (0, 1), value=1.0)
    absmax = torch.stack([blocks, -blocks], dim=-1).flatten()
    absmax_q, nested = ops.absmax_quantize(absmax)
    assert nested[-1] == 0
    assert (nested[:-1] == 1).all()
    assert_same_bits(absmax_q.long(), torch.bucketize(absmax, midpoints, right=False))
