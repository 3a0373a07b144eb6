"""The norm of all gradients: asked for before a step, it is the one that the step clips by, and is computed once."""

import math

import pytest
import torch

from nf4lora import PagedAdamW
from nf4lora.optim import paged_adamw

from support.bits import assert_same_bits


def parameters(grads):
    params = [torch.nn.Parameter(torch.zeros(len(grad))) for grad in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = torch.tensor(grad)
    return params


@pytest.fixture
def computed(monkeypatch):
    """How often a norm was computed."""
    calls = []
    total_norm = paged_adamw.total_norm
    monkeypatch.setattr(paged_adamw, "total_norm", lambda grads: calls.append(len(grads)) or total_norm(grads))
    return calls


GRADS = [[3.0, 0.0], [0.0, 4.0, 12.0]]


def test_it_is_that_of_all_gradients():
    params = parameters(GRADS)
    params.append(torch.nn.Parameter(torch.ones(3)))  # without a gradient
    optimizer = PagedAdamW([{"params": params[:1]}, {"params": params[1:]}])
    assert optimizer.grad_norm() == 13.0
    assert optimizer.grad_norm().dtype is torch.float32
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0.0


def test_a_step_clips_by_the_norm_that_was_asked_for(computed):
    params, others = parameters(GRADS), parameters(GRADS)
    optimizer = PagedAdamW(params, betas=(0.0, 0.9), max_grad_norm=1.0)
    assert optimizer.grad_norm() == optimizer.grad_norm() == 13.0
    optimizer.step()
    assert computed == [2]
    torch.nn.utils.clip_grad_norm_(others, 1.0)
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(optimizer.state[p]["exp_avg"], q.grad, rtol=1e-6)
        assert p.grad.tolist() in GRADS  # clipped within the step, not in place


def change_in_place(params):
    params[1].grad.mul_(2)


def replace(params):
    params[1].grad = params[1].grad * 2


def drop(params):
    params[1].grad = None


@pytest.mark.parametrize("change", [change_in_place, replace, drop])
def test_a_gradient_that_changes_in_between_is_seen(computed, change):
    params, others = parameters(GRADS), parameters(GRADS)
    optimizer, other = (PagedAdamW(each, betas=(0.0, 0.9), max_grad_norm=1.0) for each in (params, others))
    optimizer.grad_norm()
    for each in (params, others):
        change(each)
    optimizer.step()
    other.step()
    assert len(computed) == 3
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)


def test_a_norm_is_good_for_one_step(computed):
    """What a communication library writes into a gradient does not count as a change, so a step forgets it."""
    params = parameters(GRADS)
    optimizer = PagedAdamW(params, max_grad_norm=1.0)
    optimizer.grad_norm()
    optimizer.step()
    optimizer.step()
    assert computed == [2, 2]


def test_without_clipping_a_step_computes_none(computed):
    params = parameters(GRADS)
    PagedAdamW(params).step()
    assert computed == []


def test_it_is_known_before_a_step_that_it_is_not_finite():
    params = parameters([[1.0], [math.nan], [2.0]])
    optimizer = PagedAdamW(params, max_grad_norm=1.0)
    assert optimizer.grad_norm().isnan()
    assert [p.grad.isfinite().all().item() for p in params] == [True, False, True]  # the culprit can be named
    optimizer.step()
    assert all(torch.equal(p, torch.zeros(1)) for p in params)
    assert optimizer.stats()["skipped"] == 3


def test_a_sparse_gradient_is_refused_by_name():
    p = torch.nn.Parameter(torch.zeros(4, 2))
    p.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(RuntimeError, match="^PagedAdamW: every gradient must be dense, got torch.sparse_coo"):
        PagedAdamW([p]).grad_norm()
