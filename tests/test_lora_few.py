"""lora_linear for the few tokens that have kernels of their own: threads, scales, long sums of the backward pass."""

import pytest
import torch

from nf4lora.ops import reference

from support.bits import assert_same_bits
from support.lora_case import FLOAT_SUM, ULP, Case, assert_close

raw = torch.ops.nf4lora
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_threads(count, call):
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16])
def test_thread_count_does_not_change_a_bit(instruction_set, M, dtype):
    case = Case(M=M, N=1337, K=1088, dtype=dtype, dropout=0.2)

    def everything():
        y, S = raw.lora_linear(*case.forward())
        return [y, S, *raw.lora_linear_backward(*case.backward(S), True)]

    alone = with_threads(1, everything)
    for count in (2, 3, 5):
        assert all(map(torch.equal, alone, with_threads(count, everything)))


@pytest.mark.parametrize("M", [1, 3, 16])
@pytest.mark.parametrize("N", [512, 513, 3000])
def test_long_sums_over_the_outputs_are_those_of_the_reference(instruction_set, M, N):
    # T = dy B is summed in parts, which several threads share.
    for dtype in DTYPES:
        case = Case(M=M, N=N, K=64, R=3, dtype=dtype)
        _, S = reference.lora_linear(*case.forward())
        got = raw.lora_linear_backward(*case.backward(S), True)
        expected = reference.lora_linear_backward(*case.backward(S))
        assert_close(got[0], expected[0], 2 * ULP[dtype], "dx")
        assert_close(got[1], expected[1], FLOAT_SUM + ULP[dtype] / min(M, 2), "dA")
        assert_close(got[2], expected[2], FLOAT_SUM, "dB")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 5, 12])
def test_a_scale_that_is_no_number_spoils_its_own_row_alone(instruction_set, M, dtype):
    for bits in (0x7FC00000, -1, 0x7FFFFFFF, 0x7F800000):  # NaNs, also those that rounding could carry over; infinity
        case = Case(M=M, N=40, K=160, R=0, blocksize=32, dtype=dtype, double_quant=False, bias=False)
        case.x[:] = case.x.abs() + 1
        case.absmax[7].view(torch.int32)[-1] = bits
        y, _ = raw.lora_linear(*case.forward())
        broken = ~y.isfinite()
        assert broken[:, 7].all()
        assert broken.sum() == M


def test_every_scale_of_the_nested_map_is_decoded(instruction_set):
    # All 256 codes, at every place of a vector of them, and counts that fill no vector.
    from nf4lora import ops

    codes = torch.arange(256 * 3, dtype=torch.int32).mul(37).remainder(256).to(torch.uint8)
    for count in (1, 5, 31, 32, 63, 64, 65, 130, 768):
        for first in (0, 1, 17):
            part = codes[first : first + count]
            nested = torch.rand(-(-len(part) // 256) + 1)
            assert_same_bits(ops.absmax_dequantize(part, nested), reference.absmax_dequantize(part, nested))


@pytest.mark.parametrize("M", [1, 4, 8, 9, 16])
def test_scratch_memory_of_another_call_leaves_nothing_behind(instruction_set, M):
    # Buffers are kept between calls: a smaller layer after a larger one must not see what is left in them.
    large, small = (
        Case(M=16, N=70, K=4224, dtype=torch.bfloat16),
        Case(M=M, N=33, K=96, blocksize=32, dtype=torch.bfloat16),
    )
    large.x[:] = float("nan")
    before = raw.lora_linear(*small.forward())
    raw.lora_linear(*large.forward())
    after = raw.lora_linear(*small.forward())
    assert all(map(torch.equal, before, after))
    assert after[0].isfinite().all()
