"""How tests compare tensors to the bit: what counts as the same, and what a difference says."""

import pytest
import torch

from support.bits import assert_same_bits


def test_the_first_difference_is_shown_with_its_bits():
    expected = torch.zeros(2, 3)
    actual = expected.clone()
    actual[1, 0], actual[1, 2] = -0.0, 1.5
    shown = r"^2 of 6 values differ, first at \[1, 0\]: -0.0 \(bits 0x80000000\) is not 0.0 \(bits 0x00000000\)$"
    with pytest.raises(AssertionError, match=shown):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_every_width_is_compared(dtype):
    expected = torch.tensor([0, 1, 1]).to(dtype)
    assert_same_bits(expected.clone(), expected)
    with pytest.raises(AssertionError, match=r"in y: 1 of 3 values differ, first at \[0\]"):
        assert_same_bits(torch.tensor([1, 1, 1]).to(dtype), expected, "in y")


def test_one_nan_is_another_and_no_number():
    nan, other = torch.tensor([float("nan")]), torch.tensor([-float("nan")])
    assert_same_bits(nan, other)
    with pytest.raises(AssertionError, match="nan"):
        assert_same_bits(nan, torch.tensor([1.0]))


def test_dtype_and_shape_are_compared_first():
    with pytest.raises(AssertionError, match=r"torch.float32 is not torch.float16"):
        assert_same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.float16))
    with pytest.raises(AssertionError, match=r"shape \[1\] is not \[\]"):
        assert_same_bits(torch.zeros(1), torch.tensor(0.0))


def test_strides_do_not_count_and_nothing_is_the_same_as_nothing():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert_same_bits(matrix.T, matrix.T.contiguous())
    assert_same_bits(matrix[:0], torch.zeros(0, 3))
