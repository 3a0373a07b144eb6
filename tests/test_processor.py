"""Products of 16-bit matrices on a processor that has none of them: as exact as those of float32."""

import pytest
import torch

from nf4lora.loss import processor

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["as this processor", "in float32"])
def converts(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(processor, "multiplies", lambda dtype: dtype is torch.float32)
        monkeypatch.setattr(processor, "COLUMNS", 48)  # of 200: with a ragged last part


@pytest.mark.usefixtures("converts")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_products_are_those_of_float64_but_for_rounding(dtype):
    x, weight, p = torch.randn(7, 33).to(dtype), torch.randn(200, 33).to(dtype), torch.rand(7, 200)
    scores, sums = processor.times_transposed(x, weight), processor.times(p, weight)
    assert scores.dtype == sums.dtype == dtype
    # One rounding to the dtype, and float32's of the sums. p is rounded to the dtype before it is multiplied.
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-4}
    torch.testing.assert_close(scores.double(), x.double() @ weight.double().T, **tolerance)
    torch.testing.assert_close(sums.double(), p.to(dtype).double() @ weight.double(), **tolerance)


def test_only_x86_without_the_instructions_converts(monkeypatch):
    sets = ["scalar", "avx2"]
    monkeypatch.setattr(processor._C, "cpu_instruction_sets", lambda: sets)
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    assert [processor.multiplies(each) for each in (torch.float32, *HALVES)] == [True, False, False]
    sets.append("avx512bf16")
    assert [processor.multiplies(each) for each in (torch.float32, *HALVES)] == [True, True, False]
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert processor.multiplies(torch.bfloat16)
