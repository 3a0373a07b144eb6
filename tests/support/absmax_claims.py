"""What every absmax kernel must hold, wherever it runs: one body for the CPU's instruction sets, a GPU, and PTX.

A test file imports these tests and brings the fixture `absmax_ops`, which has `quantize(absmax) -> (absmax_q, nested)`
and `dequantize(absmax_q, nested) -> absmax`.
"""

import pytest
import torch

from nf4lora.ops import reference

from support.bits import assert_same_bits


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_quantizes_as_the_reference(ops, absmax: torch.Tensor) -> None:
    absmax_q, nested = ops.quantize(absmax)
    expected_q, expected_nested = reference.absmax_quantize(absmax)
    assert_same_bits(nested, expected_nested)
    assert_same_bits(absmax_q, expected_q)


@pytest.mark.parametrize("count", [1, 2, 31, 255, 256, 257, 2048 + 1, 9 * 256 + 77])
def test_quantize_equals_the_reference(absmax_ops, count):
    assert_quantizes_as_the_reference(absmax_ops, torch.rand(count, generator=generator()))


def test_offset_is_summed_in_the_contracts_order(absmax_ops):
    # In fours: large, a, -large, b. float64 loses a beside the large value, and whatever was there before.
    a, b = torch.rand(2, 640, generator=generator())
    large = 2.0 ** torch.randint(60, 80, (640,), generator=generator())
    values = torch.stack([large, a, -large, b], dim=1).flatten()[:-20]
    assert_quantizes_as_the_reference(absmax_ops, values)

    def offset(ordered):
        return reference.absmax_quantize(ordered)[1][-1]

    assert offset(values) != offset(values.flip(0))
    assert offset(values) != offset(torch.stack([a, large, b, -large], dim=1).flatten()[:-20])  # neighbours exchanged
    one_long_sum = 0.0
    for value in values.tolist():
        one_long_sum += value
    assert offset(values) != torch.tensor(one_long_sum / len(values)).float()


def test_division_is_not_a_multiplication_by_the_inverse(absmax_ops):
    # Around p times a midpoint of the map, x / p and x * (1 / p) can fall on two sides of it.
    code, p = reference.nested_code(), torch.tensor(0.7317)
    x = p * ((code[1:] + code[:-1]) / 2)[:127]
    x = torch.cat([x, torch.nextafter(x, torch.tensor(1.0)), torch.nextafter(x, torch.tensor(-1.0))])
    x = x[reference.nearest(x / p, code) != reference.nearest(x * (1 / p), code)]
    assert len(x) > 3
    pairs = torch.stack([x, -x], dim=1).flatten()  # of opposite sign: the offset is exactly zero
    assert_quantizes_as_the_reference(absmax_ops, torch.cat([pairs, p[None], -p[None]]))


def test_ties_take_the_lower_index(absmax_ops):
    # Pairs of opposite sign make an offset of exactly zero, and 1 makes a scale of exactly one.
    code = reference.nested_code()
    midpoints = (code[1:] + code[:-1]) / 2
    values = torch.cat([midpoints[:127], -midpoints[:127], torch.tensor([1.0, -1.0])])
    assert_quantizes_as_the_reference(absmax_ops, values)
    assert_same_bits(absmax_ops.quantize(values)[0][:127], torch.arange(127, dtype=torch.uint8))


def test_equal_and_tiny_and_huge_values(absmax_ops):
    equal = torch.full((300,), 0.3)
    assert_quantizes_as_the_reference(absmax_ops, equal)
    assert_quantizes_as_the_reference(absmax_ops, torch.zeros(512))
    assert_quantizes_as_the_reference(absmax_ops, torch.rand(300, generator=generator()) * 1e-38)
    assert_quantizes_as_the_reference(absmax_ops, torch.rand(300, generator=generator()) * 3.4e38)
    halves = torch.cat([torch.zeros(256), torch.full((256,), 2.0)])  # each block is all alike, but not at the mean
    assert_quantizes_as_the_reference(absmax_ops, halves)


@pytest.mark.parametrize("count", [1, 3, 4, 255, 256, 257, 4096 + 2])
def test_dequantize_equals_the_reference(absmax_ops, count):
    absmax_q = torch.randint(256, (count,), generator=generator(), dtype=torch.uint8)
    nested = torch.rand(-(-count // 256) + 1, generator=generator())
    assert_same_bits(absmax_ops.dequantize(absmax_q, nested), reference.absmax_dequantize(absmax_q, nested))


def test_dequantize_rounds_twice(absmax_ops):
    absmax_q = torch.arange(256, dtype=torch.uint8).repeat(16)
    nested = torch.cat([torch.rand(16, generator=generator()), torch.tensor([0.0615])])
    got = absmax_ops.dequantize(absmax_q, nested)
    assert_same_bits(got, reference.absmax_dequantize(absmax_q, nested))
    products = reference.nested_code()[absmax_q.long()].double() * nested[:-1].repeat_interleave(256).double()
    fused = (products + nested[-1].double()).float()
    assert not torch.equal(got, fused)  # so the test would see a fused multiply-add
