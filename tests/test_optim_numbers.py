"""The numbers of PagedAdamW: schedules that change them, those that are refused, and what multiplies gradients."""

import math
import warnings

import pytest
import torch
from torch import nn

from nf4lora import PagedAdamW

from support.bits import assert_same_bits

SIZES = [(64, 48), (7,), (9000,), (1,), (3, 5, 90)]
DTYPES = torch.float32, torch.bfloat16, torch.float16


def parameters(sizes=SIZES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def give_gradients(step, *lists):
    """The same gradients to each list."""
    generator = torch.Generator().manual_seed(step)
    for same in zip(*lists, strict=True):
        grad = torch.randn(same[0].shape, generator=generator)
        for p in same:
            p.grad = grad.to(p)


def test_schedules_may_change_betas_and_rates():
    params, others = parameters(), parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns where it does not see the steps
        optimizer = PagedAdamW(params, lr=1e-2)
        torchs = torch.optim.AdamW(others, lr=1e-2, foreach=False, fused=False)
        cycles = [torch.optim.lr_scheduler.OneCycleLR(each, 0.1, total_steps=6) for each in (optimizer, torchs)]
        betas = set()
        for step in range(6):
            give_gradients(step, params, others)
            for each, cycle in zip((optimizer, torchs), cycles, strict=True):
                each.step()
                if step < 5:
                    cycle.step()
            betas.add(optimizer.param_groups[0]["betas"][0])
    assert len(betas) > 3
    for p, q in zip(params, others, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(optimizer.state[p][name], torchs.state[q][name])


def test_a_rate_that_is_a_tensor_may_be_changed_in_place():
    (p,), (q,) = parameters([(300,)]), parameters([(300,)])
    rate = torch.tensor(1e-2)
    optimizer, plain = PagedAdamW([p], lr=rate), PagedAdamW([q], lr=float(rate))
    for step, value in enumerate([1e-2, 1e-3, 0.0]):
        rate.fill_(value)
        plain.param_groups[0]["lr"] = float(rate)
        before = p.detach().clone()
        give_gradients(step, [p], [q])
        optimizer.step()
        plain.step()
        assert_same_bits(p, q)
        assert torch.equal(p, before) == (value == 0.0)


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf])
def test_numbers_that_are_refused(name, value):
    with pytest.raises(ValueError) as caught:
        PagedAdamW(parameters(), **{name: value})
    assert str(caught.value) == f"PagedAdamW: {name} must be finite and not negative, got {value}"


@pytest.mark.parametrize("value", [-1, 0, math.nan, -math.inf])
def test_norms_that_are_refused(value):
    with pytest.raises(ValueError) as caught:
        PagedAdamW(parameters(), max_grad_norm=value)
    assert str(caught.value) == f"PagedAdamW: max_grad_norm must be positive, or None, got {value}"


# ---- clipping and loss scaling


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipping_is_that_of_torch_before_its_own_step(dtype):
    params, others = parameters(dtype=dtype), parameters()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    optimizer = PagedAdamW(params, lr=1e-2, max_grad_norm=0.3)
    torchs = torch.optim.AdamW(others, lr=1e-2, foreach=False, fused=False)
    give_gradients(1, params)
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad.float()
    optimizer.step()
    assert nn.utils.clip_grad_norm_(others, 0.3) > 30  # they are clipped
    torchs.step()
    for p, q in zip(params, others, strict=True):
        for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            # the norms differ by the order of their sums: a few units of the last place
            assert torch.allclose(optimizer.state[p][name], torchs.state[q][name], rtol=2e-6 * power, atol=0)


def test_a_norm_beyond_the_dtype_of_the_gradients_is_a_norm():
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    optimizer = PagedAdamW([p], max_grad_norm=1.0)
    p.grad = torch.full_like(p, 6e4)  # whose norm, 1.9e6, float16 does not have
    optimizer.step()
    assert optimizer.stats()["skipped"] == 0
    assert torch.allclose(optimizer.state[p]["exp_avg"], torch.tensor(0.1 / math.sqrt(1000)), rtol=1e-5)


def test_steps_that_a_loss_scaler_leaves_out_are_not_counted():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, plain = PagedAdamW([p], lr=0.1), PagedAdamW([q], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, math.inf, 2.0):
        p.grad = None
        scaler.scale((p * torch.tensor([1.0, factor, 3.0])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(factor):
            q.grad = torch.tensor([1.0, factor, 3.0])
            plain.step()
    assert_same_bits(p, q)
    assert optimizer.stats()["skipped"] == 0
    assert optimizer.state[p]["step"] == 2
    assert not torch.equal(p, torch.ones(3))
