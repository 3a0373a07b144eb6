"""What PagedAdamW saves and loads: its own state, torch's, bitsandbytes', in 8 and in 32 bits."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from nf4lora import PagedAdamW
from nf4lora.ops import reference

from support.bits import assert_same_bits
from support.steps import parameters, train

SIZES = [(64, 48), (7,), (513,), (1,), (4100,)]
BITS = pytest.mark.parametrize("bits", [32, 8])
FIRST, SECOND = reference.nested_code(), reference.square_code()


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def trained(bits, dtype=torch.float32, steps=3, **options):
    params = parameters(SIZES, dtype)
    optimizer = PagedAdamW(params, lr=1e-2, bits=bits, **options)
    train(params, optimizer, range(steps))
    return params, optimizer


def assert_same(params, optimizer, others, other):
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert value.dtype == other.state[q][name].dtype
            assert_same_bits(value, other.state[q][name], name)


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state):
    from safetensors.torch import load, save

    tensors = {f"{key}.{name}": value for key, entry in state["state"].items() for name, value in entry.items()}
    found = load(save(tensors))
    entries = {key: {name: found[f"{key}.{name}"] for name in entry} for key, entry in state["state"].items()}
    return {"state": entries, "param_groups": state["param_groups"]}


# ---- there and back


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("through", [through_torch, through_safetensors, copy.deepcopy], ids=lambda f: f.__name__)
def test_a_resumed_run_goes_on_bit_for_bit(bits, dtype, through):
    params, optimizer = trained(bits, dtype)
    saved = through(optimizer.state_dict())
    kinds = {"exp_avg": torch.uint8 if bits == 8 else torch.float32, "step": torch.float32, "absmax": torch.float32}
    for entry in saved["state"].values():
        assert {name: entry[name].dtype for name in kinds if name in entry}.items() <= kinds.items()
        assert ("absmax" in entry) == (bits == 8)
    others = copies(params)
    other = PagedAdamW(others, lr=7.0, bits=bits)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 1e-2
    assert_same(params, optimizer, others, other)
    for each, its in ((params, optimizer), (others, other)):
        train(each, its, range(3, 6))
    assert_same(params, optimizer, others, other)


@BITS
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_bit_for_bit(bits, how, tmp_path):
    params, optimizer = trained(bits, max_grad_norm=1.0, page_to=tmp_path)
    other = how(optimizer)
    others = other.param_groups[0]["params"]
    assert (other.bits, other.max_grad_norm, other.page_to) == (bits, 1.0, str(tmp_path))
    for each, its in ((params, optimizer), (others, other)):
        train(each, its, range(3, 6))
    assert_same(params, optimizer, others, other)
    assert other.stats()["mode"] == "file"
    assert params[0].data_ptr() != others[0].data_ptr()


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_a_parameter_that_is_frozen_while_it_is_loaded_waits_unharmed(bits, dtype):
    params, optimizer = trained(bits, dtype)
    others = copies(params)
    for p in others[::2]:
        p.requires_grad_(False)
    other = PagedAdamW(others, lr=1e-2, bits=bits)
    other.load_state_dict(optimizer.state_dict())
    third = PagedAdamW(copies(params), lr=1e-2, bits=bits)  # what is saved meanwhile is whole
    third.load_state_dict(through_torch(other.state_dict()))
    thirds = third.param_groups[0]["params"]
    optimizer.zero_grad()
    train(params[1::2], optimizer, [8])
    train(others[1::2], other, [8])
    train(thirds[1::2], third, [8])
    for p in others[::2]:
        p.requires_grad_(True)
    for each, its in ((params, optimizer), (others, other), (thirds, third)):
        train(each, its, [9])
    assert_same(params, optimizer, others, other)
    assert_same(params, optimizer, thirds, third)


def test_a_wrong_state_of_a_frozen_parameter_is_refused():
    params, optimizer = trained(8)
    state = optimizer.state_dict()
    state["state"][0]["absmax"] = state["state"][0]["absmax"][:-1]
    others = copies(params)
    others[0].requires_grad_(False)
    with pytest.raises(ValueError, match="the state of parameter 0 must hold absmax"):
        PagedAdamW(others, bits=8).load_state_dict(state)


@BITS
def test_a_state_can_be_loaded_where_it_was_saved(bits):
    params, optimizer = trained(bits)
    others, other = trained(bits)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(params, optimizer, others, other)


@BITS
def test_what_is_loaded_lies_in_the_arena_at_once(bits, tmp_path):
    _, optimizer = trained(bits)
    others = parameters(SIZES)
    other = PagedAdamW(others, bits=bits, page_to=tmp_path)
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    shown = other.state[others[0]]["exp_avg"]
    assert shown.data_ptr() != saved["state"][0]["exp_avg"].data_ptr()
    train(others, other, [3])
    assert other.state[others[0]]["exp_avg"] is shown


def test_saved_tensors_carry_nothing_of_their_neighbours():
    params, optimizer = trained(32)
    saved = optimizer.state_dict()["state"]
    file = io.BytesIO()
    torch.save(saved[1]["exp_avg"], file)
    assert len(file.getvalue()) < 4096  # seven floats
    assert saved[0]["exp_avg"].untyped_storage().nbytes() == 4 * params[0].numel()


def test_a_state_that_the_user_replaced_is_taken():
    params, optimizer = trained(32)
    others = copies(params)
    fresh = PagedAdamW(others, lr=1e-2)
    optimizer.state.clear()
    for each, its in ((params, optimizer), (others, fresh)):
        train(each, its, [9])
    assert_same(params, optimizer, others, fresh)
    state = optimizer.state[params[1]]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"].clone(), state["exp_avg"].abs()
    before = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    params[1].grad = torch.zeros(SIZES[1])
    optimizer.step()
    state = optimizer.state[params[1]]
    assert torch.allclose(state["exp_avg"], 0.9 * before["exp_avg"])
    assert torch.allclose(state["exp_avg_sq"], 0.999 * before["exp_avg_sq"])
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]  # each where the other belongs
    optimizer.step()
    assert torch.allclose(optimizer.state[params[1]]["exp_avg_sq"], 0.999 * 0.9 * before["exp_avg"])
    optimizer.state[params[0]]["exp_avg"] = torch.full(SIZES[0], 0.5)
    optimizer.state[params[0]]["step"] = torch.tensor(40.0)
    params[0].grad = torch.ones(SIZES[0])
    optimizer.step()
    assert torch.allclose(optimizer.state[params[0]]["exp_avg"], torch.tensor(0.55))
    assert optimizer.state[params[0]]["step"] == 41


# ---- from others


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}, {"foreach": True}], ids=str)
def test_torchs_state_goes_on_as_torch_would(options):
    params = parameters(SIZES)
    torchs = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, **options)
    train(params, torchs, range(4))
    others = copies(params)
    optimizer = PagedAdamW(others)
    optimizer.load_state_dict(through_torch(torchs.state_dict()))
    single = copies(params)
    plain = torch.optim.AdamW(single, foreach=False, fused=False)
    plain.load_state_dict(torchs.state_dict())
    plain.param_groups[0].update(foreach=False, fused=False)
    for each, its in ((single, plain), (others, optimizer)):
        train(each, its, [4])
    for p, q in zip(single, others, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert_same_bits(plain.state[p][name], optimizer.state[q][name])
        assert (p - q).detach().abs().max() <= 2 * torch.finfo(torch.float32).eps * max(
            1.0, float(p.detach().abs().max())
        )
    assert set(optimizer.param_groups[0]) == {"params", "lr", "betas", "eps", "weight_decay"}


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit", "PagedAdamW8bit"])
@BITS
def test_bitsandbytes_state_is_read(kind, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = parameters([(64, 80), (7,), (4100,)])
    theirs = getattr(bitsandbytes.optim, kind)(params, lr=1e-2, betas=(0.8, 0.99))
    try:
        train(params, theirs, range(3))
    except Exception as error:  # paging needs its CUDA library
        pytest.skip(f"bitsandbytes cannot step here: {error}")
    optimizer = PagedAdamW(params, bits=bits)
    optimizer.load_state_dict(through_torch(theirs.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), optimizer.bits) == (1e-2, (0.8, 0.99), bits)
    for p in params:
        state, mine = theirs.state[p], optimizer.state[p]
        assert int(mine["step"]) == 3
        for ours, its, code in (("exp_avg", "1", FIRST), ("exp_avg_sq", "2", SECOND)):
            value = state[f"state{its}"].flatten()
            if value.dtype == torch.uint8:
                value = reference.moment_decode(value, state[f"absmax{its}"], code)
            if bits == 8 and state[f"state{its}"].dtype == torch.uint8:
                absmax = mine["absmax"][:, 0 if its == "1" else 1]
                assert_same_bits(reference.moment_decode(mine[ours].flatten(), absmax, code), value)
            elif bits == 8:
                codes, _ = reference.moment_encode(value, code)
                assert_same_bits(mine[ours].flatten(), codes)
            else:
                assert_same_bits(mine[ours].flatten(), value)


# ---- 8 bits to 32 and back


def test_8_bits_become_the_floats_that_they_stand_for():
    params, optimizer = trained(8)
    others = copies(params)
    wide = PagedAdamW(others, bits=32)
    wide.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        state = optimizer.state[p]
        for i, (name, code) in enumerate((("exp_avg", FIRST), ("exp_avg_sq", SECOND))):
            expected = reference.moment_decode(state[name].flatten(), state["absmax"][:, i], code)
            assert_same_bits(wide.state[q][name].flatten(), expected)


def test_32_bits_become_the_nearest_of_8():
    params, optimizer = trained(32)
    others = copies(params)
    narrow = PagedAdamW(others, bits=8)
    narrow.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        for i, (name, code) in enumerate((("exp_avg", FIRST), ("exp_avg_sq", SECOND))):
            codes, absmax = reference.moment_encode(optimizer.state[p][name].flatten(), code)
            assert_same_bits(narrow.state[q][name].flatten(), codes)
            assert_same_bits(narrow.state[q]["absmax"][:, i], absmax)


# ---- what is refused, and what is left then


def of_sgd():
    params = parameters(SIZES)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    train(params, optimizer, [0])
    return optimizer.state_dict()


def of_adamw(sizes=SIZES, groups=1, kind=torch.optim.AdamW, **options):
    params = parameters(sizes)
    given = [{"params": params[i::groups]} for i in range(groups)]
    optimizer = kind(given, lr=1e-3, **options)
    train(params, optimizer, [0])
    return optimizer.state_dict()


def changed(change):
    state = of_adamw()
    change(state["state"][2], state["param_groups"][0])
    return state


def codes(**more):
    """A state whose moments have become 8-bit codes."""
    coded = {name: torch.zeros(513, dtype=torch.uint8) for name in ("exp_avg", "exp_avg_sq")}
    return changed(lambda entry, group: entry.update({**coded, **more}))


REFUSED = {
    "SGD": (of_sgd, "group 0 of the state dict must come from an AdamW, got one without betas, eps"),
    "amsgrad": (lambda: of_adamw(amsgrad=True), "must not use amsgrad, which is not supported, got True"),
    "maximize": (lambda: of_adamw(maximize=True), "must not use maximize, which is not supported, got True"),
    "Adam": (lambda: of_adamw(kind=torch.optim.Adam, weight_decay=0.1), "must have a decoupled weight decay, got Adam"),
    "sizes": (lambda: of_adamw([(64, 47), *SIZES[1:]]), "parameter 0 must hold 3072 values in exp_avg, got shape"),
    "groups": (lambda: of_adamw(groups=2), "different number of parameter groups"),
    "length": (lambda: of_adamw(SIZES[:4]), "doesn't match the size"),
    "rate": (lambda: changed(lambda entry, group: group.update(lr=-1.0)), "lr must be finite and not negative, got -1"),
    "missing": (lambda: changed(lambda entry, group: entry.pop("exp_avg_sq")), "parameter 2 must hold step, exp_avg"),
    "codes": (
        lambda: changed(lambda entry, group: entry.update(exp_avg=torch.zeros(513, dtype=torch.uint8))),
        "two moments of floats, or two of uint8, got torch.uint8 and torch.float32",
    ),
    "no absmax": (codes, r"must hold absmax \[3, 2\] with its codes, got none"),
    "absmax": (
        lambda: codes(absmax=torch.zeros(2, 2)),
        r"must hold absmax \[3, 2\] with its codes, got shape \[2, 2\]",
    ),
    "absmax of shards": (lambda: codes(absmax=torch.zeros(4, 2)), "loaded by as many processes as saved them"),
}


@BITS
@pytest.mark.parametrize("name", REFUSED)
def test_another_state_is_refused_and_nothing_is_lost(name, bits):
    make, message = REFUSED[name]
    params, optimizer = trained(bits)
    others, other = trained(bits)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for each, its in ((params, optimizer), (others, other)):
        train(each, its, range(3, 5))
    assert_same(params, optimizer, others, other)


def test_hooks_of_others_see_tensors():
    params, optimizer = trained(8)
    seen = []
    other = PagedAdamW(copies(params), bits=8)
    other.register_load_state_dict_pre_hook(lambda o, state: seen.append(state["state"][0]["exp_avg"].dtype))
    other.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [torch.uint8, len(params)]
