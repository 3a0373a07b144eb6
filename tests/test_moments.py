"""Moments as they are read from what any optimizer saved, and their 8-bit codes; beside them in a run, the next step.

Whole state dicts and what is refused of them: test_optim_state.py.
"""

import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nf4lora import PagedAdamW
from nf4lora.ops import reference
from nf4lora.optim import quantized

from support.bits import assert_same_bits
from support.steps import parameters, train

BITS = pytest.mark.parametrize("bits", [32, 8])
CODES = {"exp_avg": reference.nested_code(), "exp_avg_sq": reference.square_code()}
MAPS = pytest.mark.parametrize("name", list(CODES))
SIZES = [(64, 48), (7,), (513,)]


def zero_of(code):
    return int((code == 0).nonzero())


def drawn(name, size, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * torch.exp(spread * torch.randn(size, generator=generator))
    return values if name == "exp_avg" else values.abs()


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- codes


@given(st.sampled_from(list(CODES)), st.integers(0, 700), st.integers(0, 2**31), st.floats(0, 12), st.integers(-60, 60))
def test_codes_are_those_of_the_reference(name, size, seed, spread, exponent):
    values, code = drawn(name, size, seed, spread) * 2.0**exponent, CODES[name]
    codes, absmax = quantized.encode(values, code, zero_of(code))
    expected = reference.moment_encode(values, code)
    assert_same_bits(codes, expected[0])
    assert_same_bits(absmax, expected[1])
    assert_same_bits(quantized.decode(codes, absmax, code), reference.moment_decode(codes, absmax, code))


@MAPS
@pytest.mark.parametrize("spread", [0.5, 6.0])
def test_no_value_is_nearer_than_the_one_taken(name, spread):
    values, code = drawn(name, 2000, spread=spread), CODES[name].double()
    codes, absmax = quantized.encode(values, CODES[name], zero_of(code))
    x = values.double() / absmax.repeat_interleave(256)[:2000]
    distances = (code[None, :] - x[:, None]).abs()
    if name == "exp_avg_sq":
        distances[(code[None, :] == 0) & (x[:, None] != 0)] = math.inf  # whose root divides a step
    taken = distances.gather(1, codes.long()[:, None])[:, 0]
    # a value within float32's rounding of the quotient from the middle of two may go to either
    assert (taken - distances.amin(dim=1) <= 2**-23 * x.abs()).all()
    assert (taken > 0).any()
    assert codes.unique().numel() > 60


@MAPS
def test_a_tie_goes_to_the_smaller(name):
    code = CODES[name]
    zero, wide = zero_of(code), code.double()
    middle = (code[1:] + code[:-1]) / 2
    exact = [k for k in range(zero + 1, 255) if middle[k].double() * 2 == wide[k] + wide[k + 1]][:127]
    assert len(exact) > 20
    beyond = torch.nextafter(middle[exact], torch.tensor(2.0))
    values = torch.cat([torch.ones(1), middle[exact], beyond])  # the largest is 1: a value is its own quotient
    codes, _ = quantized.encode(values, code, zero)
    assert codes.tolist() == [255, *exact, *(k + 1 for k in exact)]


@MAPS
def test_nothing_but_zero_is_encoded_as_the_zero_of_second_moments(name):
    values = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1e-10, 3.0])
    code, second = CODES[name], name == "exp_avg_sq"
    codes, absmax = quantized.encode(values, code, zero_of(code))
    assert (codes == zero_of(code)).tolist() == [True, True, not second, not second, not second, False]
    codes, absmax = quantized.encode(torch.zeros(300), code, zero_of(code))
    assert (codes == zero_of(code)).all()
    assert absmax.tolist() == [0.0, 0.0]


@MAPS
def test_every_code_survives_32_bits(name):
    """All codes, in a block whose largest is positive: what was decoded is encoded as it was."""
    code, absmax = CODES[name], torch.tensor([0.37, 3e-20])
    codes = torch.arange(512).remainder(256).to(torch.uint8)
    values = quantized.decode(codes, absmax, code)
    again = quantized.encode(values, code, zero_of(code))
    assert_same_bits(again[0], codes)
    assert_same_bits(again[1], absmax)


@BITS
def test_moments_of_the_asked_bits_are_taken_as_they_are(bits):
    first, second = drawn("exp_avg", 300), drawn("exp_avg_sq", 300)
    wide = quantized.Moments(5.0, first, second)
    narrow = wide.as_bits(8)
    assert wide.as_bits(32) is wide
    assert narrow.as_bits(8) is narrow
    assert (narrow.step, narrow.as_bits(32).step) == (5.0, 5.0)
    assert narrow.absmax.shape == (2, 2)
    assert narrow.as_bits(32).absmax is None
    for i, name in enumerate(CODES):
        assert_same_bits(narrow.absmax[:, i], reference.moment_encode(getattr(wide, name), CODES[name])[1])


# ---- bitsandbytes' layout, made here: versions differ in where they nest it, the length of a block and the maps


def of_bitsandbytes(count, block, scale_of_map=1.0, nested=True):
    generator = torch.Generator().manual_seed(1)
    entry = {"step": 12}
    for i, code in enumerate(CODES.values(), 1):
        entry |= {
            f"state{i}": torch.randint(0, 256, (count,), generator=generator).to(torch.uint8),
            f"absmax{i}": torch.rand(-(-count // block), generator=generator),
            f"qmap{i}": code * scale_of_map,
        }
    if not nested:
        return entry
    return {"step": entry.pop("step"), "__bnb_optimizer_quant_state__": entry}


def loaded(entry, count, bits):
    """What becomes of one parameter's state."""
    params = [nn.Parameter(torch.zeros(count))]
    optimizer = PagedAdamW(params, bits=bits)
    optimizer.load_state_dict({"state": {0: entry}, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer.state[params[0]]


@pytest.mark.parametrize("nested", [True, False])
def test_blocks_of_256_are_taken_code_for_code(nested):
    found = loaded(of_bitsandbytes(1000, 256, nested=nested), 1000, 8)
    entry = of_bitsandbytes(1000, 256, nested=False)
    assert found["step"] == 12.0
    assert_same_bits(found["exp_avg"], entry["state1"])
    assert_same_bits(found["exp_avg_sq"], entry["state2"])
    assert_same_bits(found["absmax"], torch.stack([entry["absmax1"], entry["absmax2"]], dim=1))


@BITS
@pytest.mark.parametrize(
    ("count", "block", "scale"), [(9000, b, 1.0) for b in (256, 512, 1024, 2048, 4096)] + [(1000, 256, 0.5)]
)
def test_blocks_and_maps_of_any_kind_are_decoded(count, block, scale, bits):
    found = loaded(of_bitsandbytes(count, block, scale), count, bits)
    entry = of_bitsandbytes(count, block, scale, nested=False)
    for i, (name, code) in enumerate(CODES.items(), 1):
        scales = torch.cat([a.repeat(block) for a in entry[f"absmax{i}"].view(-1, 1)])[:count]
        value = entry[f"qmap{i}"][entry[f"state{i}"].long()] * scales
        if bits == 8 and (block, scale) != (256, 1.0):
            value, absmax = reference.moment_encode(value, code)
            assert_same_bits(found["absmax"][:, i - 1], absmax)
        elif bits == 8:
            value = entry[f"state{i}"]
        assert_same_bits(found[name], value)


def without(entry, *names):
    return {name: value for name, value in entry.items() if name not in names}


@BITS
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            without(of_bitsandbytes(1000, 256, nested=False), "absmax1", "absmax2"),
            "be quantised by blocks (absmax1, qmap1), got step, state1, qmap1, state2, qmap2",
        ),
        (of_bitsandbytes(1000, 100), "have a scale per 256 to 4096 of 1000 values, got 10"),
        (of_bitsandbytes(999, 256), "hold 1000 values in state1, got shape [999]"),
        ({"step": 1, "state1": torch.zeros(1000)}, "hold step, exp_avg and exp_avg_sq, got step, state1"),
        ({"momentum_buffer": None}, "hold step, exp_avg and exp_avg_sq, got momentum_buffer"),
        ({"max_exp_avg_sq": None}, "not use amsgrad, which is not supported, got max_exp_avg_sq"),
        (
            {"step": 1, "exp_avg": torch.zeros(1000, dtype=torch.int64), "exp_avg_sq": torch.zeros(1000)},
            "hold two moments of floats, or two of uint8, got torch.int64 and torch.float32",
        ),
    ],
    ids=["not by blocks", "block", "size", "one moment", "SGD", "amsgrad", "integers"],
)
def test_what_does_not_fit_says_what_it_must_be(entry, message, bits):
    with pytest.raises(ValueError) as caught:
        loaded(entry, 1000, bits)
    assert str(caught.value) == f"PagedAdamW: the state of parameter 0 must {message}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_moments_of_any_float_are_read_as_float32(dtype):
    first, second = drawn("exp_avg", 50, spread=1.0).to(dtype), drawn("exp_avg_sq", 50, spread=1.0).to(dtype)
    found = loaded({"step": 3, "exp_avg": first.view(5, 10), "exp_avg_sq": second}, 50, 32)
    assert found["exp_avg"].dtype == found["exp_avg_sq"].dtype == torch.float32
    assert_same_bits(found["exp_avg"], first.float())
    assert_same_bits(found["exp_avg_sq"], second.float())


# ---- in a run


def assert_next_step_is_the_references(optimizer, params, bits):
    """From what `state` holds now, to the bit: numbers of the group, count of the state."""
    group, before = optimizer.param_groups[0], [p.detach().clone() for p in params]
    states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    train(params, optimizer, [77])
    for p, old, state in zip(params, before, states, strict=True):
        numbers = {"lr": group["lr"], "beta1": group["betas"][0], "beta2": group["betas"][1]}
        numbers |= {"eps": group["eps"], "weight_decay": group["weight_decay"], "step": int(state["step"]) + 1}
        flat = [each.flatten() for each in (old, p.grad, state["exp_avg"], state["exp_avg_sq"])]
        param, *wanted, _ = reference.adamw_step(*flat, state.get("absmax"), **numbers)
        assert_same_bits(p.detach().flatten(), param)
        for name, value in zip(("exp_avg", "exp_avg_sq", "absmax"), wanted):
            assert value is None or torch.equal(optimizer.state[p][name].view(value.shape), value)


def assert_moments(optimizer, params, expected, bits):
    """What the optimizer holds are these floats, or the nearest of 8 bits."""
    for p, pair in zip(params, expected, strict=True):
        for i, (name, value) in enumerate(zip(CODES, pair, strict=True)):
            found, value = optimizer.state[p][name].flatten(), value.float().flatten()
            if bits == 8:
                value, absmax = reference.moment_encode(value, CODES[name])
                assert_same_bits(optimizer.state[p]["absmax"][:, i], absmax)
            assert found.dtype == value.dtype
            assert_same_bits(found, value)


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam], ids=lambda kind: kind.__name__)
def test_a_run_of_torchs_goes_on(kind, dtype, bits):
    params = parameters(SIZES, dtype)
    theirs = kind(params, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0, foreach=False)
    train(params, theirs, range(3))
    optimizer = PagedAdamW(params, bits=bits)
    optimizer.load_state_dict(saved(theirs.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (1e-2, (0.8, 0.95), 1e-6, 0.0)
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 3, 3]
    assert_moments(optimizer, params, [[theirs.state[p][name] for name in CODES] for p in params], bits)
    assert_next_step_is_the_references(optimizer, params, bits)


@BITS
@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit", "Adam8bit"])
def test_a_run_of_bitsandbytes_goes_on(kind, bits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    params = parameters([(64, 80), (7,), (4100,)])
    theirs = getattr(bitsandbytes.optim, kind)(params, lr=1e-2, weight_decay=0.0)
    train(params, theirs, range(3))
    assert ("8bit" in kind) == (theirs.state[params[0]]["state1"].dtype == torch.uint8)
    optimizer = PagedAdamW(params, bits=bits)
    optimizer.load_state_dict(saved(theirs.state_dict()))
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 3, 3]
    assert_next_step_is_the_references(optimizer, params, bits)


@BITS
def test_loading_keeps_how_the_state_is_held(bits, tmp_path):
    of_other_bits = PagedAdamW(parameters(SIZES), lr=0.5, bits=40 - bits, max_grad_norm=9.0)
    train(of_other_bits.param_groups[0]["params"], of_other_bits, range(2))
    of_other_bits.param_groups[0]["initial_lr"] = 0.25  # as a scheduler leaves it
    optimizer = PagedAdamW(parameters(SIZES), bits=bits, max_grad_norm=1.0, page_to=tmp_path)
    optimizer.load_state_dict(saved(of_other_bits.state_dict()))
    assert (optimizer.bits, optimizer.max_grad_norm, optimizer.stats()["mode"]) == (bits, 1.0, "file")
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["initial_lr"]) == (0.5, 0.25)
    params = optimizer.param_groups[0]["params"]
    assert {optimizer.state[p]["exp_avg"].dtype for p in params} == {torch.uint8 if bits == 8 else torch.float32}


@BITS
def test_what_is_missing_from_a_state_begins_anew(bits):
    params, fresh = parameters(SIZES), parameters(SIZES)
    optimizer = PagedAdamW(params, bits=bits)
    train(params, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]
    optimizer.load_state_dict(state)
    assert params[1] not in optimizer.state
    fresh[1].data.copy_(params[1].data)
    alone = PagedAdamW([fresh[1]], bits=bits)
    train(params, optimizer, [5])
    fresh[1].grad = params[1].grad
    alone.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 1, 3]
    assert_same_bits(params[1], fresh[1])


@pytest.mark.parametrize("kind", ["NAdam", "RAdam"])
def test_a_relative_of_adam_is_refused(kind):
    """Its moments have the names of AdamW's, but its steps are others."""
    params, others = parameters(SIZES), parameters(SIZES)
    theirs = getattr(torch.optim, kind)(params)
    train(params, theirs, range(2))
    with pytest.raises(ValueError, match="^PagedAdamW: .*must"):
        PagedAdamW(others).load_state_dict(theirs.state_dict())


@BITS
def test_a_state_may_be_loaded_in_another_order(bits):
    """Of the optimizer's own tensors, which are where the loaded ones go."""
    params = [nn.Parameter(torch.zeros(300)) for _ in range(3)]
    optimizer = PagedAdamW(params, bits=bits)
    train(params, optimizer, range(2))
    state = optimizer.state_dict()
    expected = [{name: value.clone() for name, value in state["state"][key].items()} for key in (2, 0, 1)]
    state["state"] = {i: state["state"][key] for i, key in enumerate((2, 0, 1))}
    optimizer.load_state_dict(state)
    for p, entry in zip(params, expected, strict=True):
        for name, value in entry.items():
            assert_same_bits(optimizer.state[p][name], value, name)
