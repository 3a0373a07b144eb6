"""PagedAdamW where something changes under it: which parameters take part, their dtype and order, the state.

All of it is compared with the reference, to the bit.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nf4lora import PagedAdamW
from nf4lora.ops import reference
from nf4lora.optim.arena import RamArena

from support.bits import assert_same_bits

BITS = pytest.mark.parametrize("bits", [32, 8])
SIZES = [(64, 48), (7,), (9000,), (1,), (3, 5, 90)]
DTYPES = torch.float32, torch.bfloat16, torch.float16


def parameters(sizes=SIZES, device="cpu", dtypes=DTYPES[:1]):
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(size, generator=generator) for size in sizes]
    return [nn.Parameter(value.to(device, dtypes[i % len(dtypes)])) for i, value in enumerate(values)]


def give_gradients(step, *lists):
    """The same gradients to each list."""
    generator = torch.Generator().manual_seed(step)
    for same in zip(*lists, strict=True):
        grad = torch.randn(same[0].shape, generator=generator)
        for p in same:
            p.grad = grad.to(p)


def assert_same(params, others):
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)


class Expected:
    """A parameter's course by the reference, beside the optimizer's."""

    def __init__(self, p, bits):
        count = p.numel()
        self.value, self.step = p.detach().cpu().flatten().clone(), 0
        if bits == 32:
            self.state = (torch.zeros(count), torch.zeros(count), None)
        else:
            zeros = torch.zeros(count, dtype=torch.uint8)
            self.state = (zeros + 127, zeros, torch.zeros(-(-count // 256), 2))

    def take(self, grad, group, scale=1.0):
        self.step += 1
        names = {"lr": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
        names |= dict(zip(("beta1", "beta2"), group["betas"]))
        self.value, *state, _ = reference.adamw_step(
            self.value, grad.cpu().flatten(), *self.state, scale=scale, step=self.step, **names
        )
        self.state = tuple(state)

    def assert_is(self, p, state):
        assert_same_bits(p.detach().cpu().flatten(), self.value)
        assert int(state["step"]) == self.step
        for name, value in zip(("exp_avg", "exp_avg_sq", "absmax"), self.state):
            assert value is None or torch.equal(state[name].cpu().view(value.shape), value), name


# ---- which parameters take part


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=5),
    st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=5, max_size=5),
    st.sampled_from([32, 8]),
    st.sampled_from([1 << 12, 20_000, 1 << 62]),
)
def test_any_parameters_may_take_part_in_any_step_in_any_group(taking_part, groups, bits, chunk_bytes):
    """A step keeps the calls of the step before; here that has to be noticed when they are no longer right."""
    params = parameters()
    expected = [Expected(p, bits) for p in params]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RamArena, "chunk_bytes", chunk_bytes)
        optimizer = PagedAdamW(params, lr=1e-2, weight_decay=0.1, bits=bits)
        optimizer.add_param_group({"params": [], "lr": 3e-3, "betas": (0.7, 0.95)})
        for step, (part, group) in enumerate(zip(taking_part, groups)):
            give_gradients(step, params)
            for i, each in enumerate(optimizer.param_groups):
                each["params"] = [p for p, of in zip(params, group) if of == i]
                each["lr"] = (step + 1) * (1 + i) * 1e-3
            for p, its, takes, of in zip(params, expected, part, group, strict=True):
                if takes:
                    its.take(p.grad, optimizer.param_groups[of])
                else:
                    p.grad = None
            optimizer.step()
    for p, its in zip(params, expected, strict=True):
        if its.step:
            its.assert_is(p, optimizer.state[p])
        else:
            assert p not in optimizer.state
            assert_same_bits(p.detach().flatten(), its.value)


@BITS
def test_a_parameter_that_moves_to_the_next_group_takes_its_numbers(bits):
    """The order of all parameters stays, and so do their counts of steps."""
    params = parameters()
    optimizer = PagedAdamW([{"params": params[:3], "lr": 1e-2}, {"params": params[3:], "lr": 1e-3}], bits=bits)
    expected = [Expected(p, bits) for p in params]
    for step, first in enumerate([3, 3, 2, 4, 0, 5]):
        for group, some in zip(optimizer.param_groups, (params[:first], params[first:]), strict=True):
            group["params"] = some
        give_gradients(step, params)
        for i, its in enumerate(expected):
            its.take(params[i].grad, optimizer.param_groups[i >= first])
        optimizer.step()
    for p, its in zip(params, expected, strict=True):
        its.assert_is(p, optimizer.state[p])


@BITS
def test_parameters_of_three_dtypes_share_a_step(device, bits):
    params = parameters(device=device, dtypes=DTYPES)
    optimizer = PagedAdamW(params, lr=1e-2, weight_decay=0.1, bits=bits)
    expected = [Expected(p, bits) for p in params]
    for step in range(4):
        give_gradients(step, params)
        for p, its in zip(params, expected, strict=True):
            its.take(p.grad, optimizer.param_groups[0])
        optimizer.step()
    optimizer.synchronize()
    for p, its in zip(params, expected, strict=True):
        its.assert_is(p, optimizer.state[p])


@BITS
def test_state_of_what_joins_later_lies_elsewhere(bits):
    params, others = parameters(), parameters()
    optimizer, apart = PagedAdamW(params[:3], bits=bits), PagedAdamW(others[:3], bits=bits)
    give_gradients(0, params, others)
    for each in (optimizer, apart):
        each.step()
    kept = {name: (value, value.clone()) for name, value in optimizer.state[params[0]].items()}
    size = optimizer.stats()["bytes"]
    optimizer.add_param_group({"params": params[3:]})
    joined = PagedAdamW(others[3:], bits=bits)
    for p in params[:3]:
        p.grad = None
    optimizer.step()
    for name, (value, before) in kept.items():
        assert optimizer.state[params[0]][name] is value
        assert_same_bits(value, before)
    assert optimizer.stats()["bytes"] > size
    joined.step()
    give_gradients(1, params, others)
    for each in (optimizer, apart, joined):
        each.step()
    assert_same(params, others)


@BITS
def test_a_parameter_that_was_frozen_goes_on_where_it_stood(bits):
    params = parameters()
    optimizer, expected = PagedAdamW(params, lr=1e-2, bits=bits), [Expected(p, bits) for p in params]
    frozen = {1: [0], 2: [0, 2], 3: [2]}
    for step in range(5):
        if step == 3:  # everything is placed anew where something joins
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        give_gradients(step, params)
        for i, (p, its) in enumerate(zip(params, expected, strict=True)):
            p.requires_grad_(i not in frozen.get(step, []))
            if p.requires_grad:
                its.take(p.grad, optimizer.param_groups[0])
            else:
                p.grad = None
        optimizer.step()
    for p, its in zip(params, expected, strict=True):
        its.assert_is(p, optimizer.state[p])


@BITS
def test_nothing_to_do(device, bits):
    params = parameters([(0, 3), (0,)], device)
    optimizer = PagedAdamW(params, bits=bits, max_grad_norm=1.0)
    assert optimizer.step() is None
    assert optimizer.step(lambda: 3.0) == 3.0
    assert len(optimizer.state) == 0
    assert optimizer.stats()["mode"] == "none"
    give_gradients(0, params)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2]
    assert optimizer.stats()["bytes"] == 0
    assert optimizer.state[params[0]]["exp_avg_sq"].shape == (0, 3)


def test_only_what_was_updated_is_refused_by_backward():
    updated, left = (nn.Parameter(torch.ones(3)) for _ in range(2))
    losses = (updated * updated).sum(), (left * left).sum()
    updated.grad = torch.ones(3)
    PagedAdamW([updated, left]).step()
    losses[1].backward()
    assert_same_bits(left.grad, torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()


# ---- dtype and order in memory


@BITS
def test_a_model_may_change_its_dtype(bits):
    params = parameters(SIZES[:3])
    optimizer, expected = PagedAdamW(params, lr=1e-2, bits=bits), [Expected(p, bits) for p in params]
    for step, dtype in enumerate([torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]):
        for p, its in zip(params, expected, strict=True):
            p.grad = None
            p.data, its.value = p.data.to(dtype), its.value.to(dtype)
        give_gradients(step, params)
        for p, its in zip(params, expected, strict=True):
            its.take(p.grad, optimizer.param_groups[0])
        optimizer.step()
    for p, its in zip(params, expected, strict=True):
        its.assert_is(p, optimizer.state[p])


@BITS
def test_state_of_a_transposed_parameter_is_in_its_order(device, bits):
    """Blocks of 8 bits are those of a contiguous parameter: state goes from one to the other."""
    p = nn.Parameter(torch.randn(48, 64, device=device).T)
    q = nn.Parameter(p.detach().contiguous())
    optimizer, contiguous = PagedAdamW([p], lr=1e-2, bits=bits), PagedAdamW([q], lr=1e-2, bits=bits)
    for step in range(4):
        give_gradients(step, [p], [q])
        for each in (optimizer, contiguous):
            each.step()
        if step == 1:
            states = [copy.deepcopy(each.state_dict()) for each in (optimizer, contiguous)]
            optimizer.load_state_dict(states[1])
            contiguous.load_state_dict(states[0])
    assert not p.is_contiguous()
    assert_same_bits(p, q)


# ---- state


@BITS
def test_state_that_is_changed_in_place_is_used(bits):
    params, others = parameters(), parameters()
    optimizer, expected = PagedAdamW(params, bits=bits), [Expected(p, bits) for p in others]
    for step in range(3):
        give_gradients(step, params)
        for p, its in zip(params, expected, strict=True):
            its.take(p.grad, optimizer.param_groups[0])
        optimizer.step()
        optimizer.state[params[0]]["step"].fill_(10.0)
        expected[0].step = 10
        reset = 127 if bits == 8 else 0.0
        optimizer.state[params[2]]["exp_avg"][:100] = reset
        expected[2].state[0][:100] = reset
    for p, its in zip(params, expected, strict=True):
        its.assert_is(p, optimizer.state[p])


@BITS
def test_states_may_be_exchanged(bits):
    p, q = params = [nn.Parameter(torch.ones(300)) for _ in range(2)]
    optimizer = PagedAdamW(params, bits=bits)
    give_gradients(0, params)
    optimizer.step()
    optimizer.state[p], optimizer.state[q] = optimizer.state[q], optimizer.state[p]
    expected = [Expected(each, bits) for each in params]
    for each, its in zip(params, expected, strict=True):
        its.step = 1
        names = ("exp_avg", "exp_avg_sq", "absmax")
        its.state = tuple(None if (v := optimizer.state[each].get(n)) is None else v.clone() for n in names)
    give_gradients(1, params)
    for each, its in zip(params, expected, strict=True):
        its.take(each.grad, optimizer.param_groups[0])
    optimizer.step()
    for each, its in zip(params, expected, strict=True):
        its.assert_is(each, optimizer.state[each])


def test_half_a_state_of_8_bits_is_refused():
    params = parameters()
    optimizer = PagedAdamW(params, bits=8)
    give_gradients(0, params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError) as caught:
        optimizer.step()
    message = "state must hold two moments of floats, or two of uint8, got torch.float32 and torch.uint8"
    assert str(caught.value) == f"PagedAdamW: {message}"
    assert_same(params, before)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_given_twice_is_refused():
    p, q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    with pytest.raises(ValueError, match="^PagedAdamW: every parameter must be given once, got 1 more than once in a"):
        PagedAdamW([p, q, p])
    optimizer = PagedAdamW([q])
    with pytest.raises(ValueError, match="given once"):
        optimizer.add_param_group({"params": [p, p]})
    assert len(optimizer.param_groups) == 1
