"""PagedAdamW as an optimizer: what it computes, beside torch.optim.AdamW, and how it is used."""

import math

import pytest
import torch
from torch import nn

import nf4lora
from nf4lora import PagedAdamW

from support.bits import assert_same_bits
from support.models import tiny_llama

SIZES = [(64, 48), (7,), (3, 5, 9), (1,), (4100,), (0,)]
BITS = pytest.mark.parametrize("bits", [32, 8])


def parameters(device="cpu", dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in sizes]


def give_gradients(step, *lists, scale=1.0):
    """The same gradients to each list."""
    generator = torch.Generator().manual_seed(step)
    for same in zip(*lists):
        grad = scale * torch.randn(same[0].shape, generator=generator)
        for p in same:
            p.grad = grad.to(p, copy=True)


def torch_adamw(params, **options):
    return torch.optim.AdamW(params, foreach=False, fused=False, **options)


def assert_follows(params, optimizer, others, torchs):
    """Moments to the bit; parameters within two units of the larger of the parameter and 1: torch's vectorised root is
    off by one now and then (see test_adamw.py), and steps add up."""
    for p, q in zip(params, others, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert_same_bits(optimizer.state[p][name], torchs.state[q][name], name)
        unit = torch.finfo(p.dtype).eps * q.detach().float().abs().clamp(min=1.0)
        assert ((p.detach() - q.detach()).float().abs() <= 2 * unit).all()


def assert_same(params, others):
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)


# ---- what is computed


def test_five_steps_in_32_bits_are_those_of_torch():
    params, others = parameters(), parameters()
    optimizer, torchs = PagedAdamW(params, lr=1e-2), torch_adamw(others, lr=1e-2)
    for step in range(5):
        give_gradients(step, params, others)
        optimizer.step()
        torchs.step()
    assert_follows(params, optimizer, others, torchs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_16_bits_keep_moments_of_32(dtype):
    params, wide = parameters(dtype=dtype), parameters()
    optimizer, exact = PagedAdamW(params, lr=1e-2), torch_adamw(wide, lr=1e-2)
    with torch.no_grad():
        for p, q in zip(params, wide, strict=True):
            q.copy_(p)
    give_gradients(1, params)
    for p, q in zip(params, wide, strict=True):
        q.grad = p.grad.float()
    optimizer.step()
    exact.step()
    for p, q in zip(params, wide, strict=True):
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        assert_same_bits(optimizer.state[p]["exp_avg_sq"], exact.state[q]["exp_avg_sq"])
        unit = torch.finfo(dtype).eps * q.detach().abs().clamp(min=2**-10)
        assert ((p.detach().float() - q.detach()).abs() <= unit).all()  # rounded once


@BITS
def test_groups_have_numbers_of_their_own(bits):
    params, apart = parameters(), parameters()
    numbers = [{"lr": 1e-2, "weight_decay": 0.0}, {"lr": 1e-3, "betas": (0.5, 0.9), "eps": 1e-6}]
    together = PagedAdamW(
        [{"params": params[:2], **numbers[0]}, {"params": params[2:], **numbers[1]}], weight_decay=0.1, bits=bits
    )
    alone = [
        PagedAdamW(some, weight_decay=0.1, bits=bits) if "weight_decay" not in options else PagedAdamW(some, bits=bits)
        for some, options in zip((apart[:2], apart[2:]), numbers)
    ]
    for optimizer, options in zip(alone, numbers, strict=True):
        optimizer.param_groups[0].update(options)
    for step in range(4):
        give_gradients(step, params, apart)
        together.step()
        for optimizer in alone:
            optimizer.step()
    assert_same(params, apart)


@BITS
def test_a_parameter_without_gradient_stays_and_counts_its_own_steps(bits):
    params, apart = parameters(), parameters()
    together, alone = PagedAdamW(params, bits=bits), [PagedAdamW([q], bits=bits) for q in apart]
    for step in range(6):
        give_gradients(step, params, apart)
        for i, (p, q) in enumerate(zip(params, apart, strict=True)):
            if (step + i) % 3 == 0 or i == 4:
                p.grad = q.grad = None
        before = params[4].detach().clone()
        together.step()
        for optimizer in alone:
            optimizer.step()
        assert_same_bits(params[4], before)
    assert_same(params, apart)
    assert params[4] not in together.state
    assert {int(together.state[p]["step"]) for p in params[:4]} == {4}


def test_parameters_that_join_later_leave_the_others_as_they_are():
    params, others = parameters(), parameters()
    optimizer, torchs = PagedAdamW(params[:2], lr=1e-2), torch_adamw(others[:2], lr=1e-2)
    give_gradients(0, params, others)
    optimizer.step()
    torchs.step()
    kept = optimizer.state[params[0]]["exp_avg"]
    optimizer.add_param_group({"params": params[2:], "lr": 1e-3})
    torchs.add_param_group({"params": others[2:], "lr": 1e-3})
    for step in range(1, 4):
        give_gradients(step, params, others)
        optimizer.step()
        torchs.step()
    assert optimizer.state[params[0]]["exp_avg"] is kept
    assert_follows(params, optimizer, others, torchs)


@pytest.mark.parametrize(
    "strange",
    [
        lambda: torch.randn(6, 4).T,
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(10, 10)[::2, 1:],
    ],
    ids=["transposed", "channels_last", "a slice"],
)
def test_parameters_in_any_order_in_memory(strange):
    torch.manual_seed(5)
    value = strange()
    p, q = nn.Parameter(value), nn.Parameter(value.clone(memory_format=torch.contiguous_format))
    optimizer, torchs = PagedAdamW([p], lr=1e-2), torch_adamw([q], lr=1e-2)
    for step in range(3):
        give_gradients(step, [q], [p])
        optimizer.step()
        torchs.step()
    assert p.stride() == value.stride()
    assert_follows([p], optimizer, [q], torchs)


def test_gradients_in_any_order_in_memory():
    p, q = parameters(sizes=[(6, 4)]), parameters(sizes=[(6, 4)])
    optimizer, torchs = PagedAdamW(p), torch_adamw(q)
    for grad in (torch.randn(4, 6).T, torch.randn(1).expand(6, 4), torch.randn(12, 8)[::2, ::2]):
        p[0].grad, q[0].grad = grad, grad.contiguous()
        optimizer.step()
        torchs.step()
    assert_follows(p, optimizer, q, torchs)


# ---- clipping, gradients that are not finite


@BITS
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_is_torchs(bits, scale):
    params, others = parameters(), parameters()
    inside, outside = PagedAdamW(params, bits=bits, max_grad_norm=0.7), PagedAdamW(others, bits=bits)
    for step in range(3):
        give_gradients(step, params, others, scale=scale)
        kept = [p.grad.clone() for p in params]
        inside.step()
        nn.utils.clip_grad_norm_(others, 0.7)
        outside.step()
        assert_same([p.grad for p in params], kept)  # the gradients themselves are left alone
    for p, q in zip(params, others, strict=True):
        # the factor's last place, through three steps; 8-bit moments may round to the neighbour then
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6 if bits == 32 else 2e-4)


@BITS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_without_a_finite_gradient_are_skipped_and_counted(bits, bad):
    params = parameters()
    optimizer = PagedAdamW(params, lr=1e-2, bits=bits)
    give_gradients(0, params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    give_gradients(1, params)
    params[0].grad[3, 5] = params[4].grad[4099] = bad
    optimizer.step()
    changed = [(p != q) for p, q in zip(params, before, strict=True)]
    assert not changed[0][3, 5]
    assert not changed[4][4099]
    assert sum(int((~each).sum()) for each in changed) == 2
    assert optimizer.stats()["skipped"] == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_with_clipping_one_gradient_that_is_not_finite_skips_all(bad):
    params = parameters()
    optimizer = PagedAdamW(params, max_grad_norm=1.0)
    give_gradients(0, params)
    params[2].grad[0, 0, 0] = bad
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert_same(params, before)
    assert optimizer.stats()["skipped"] == sum(p.numel() for p in params)


# ---- use


def test_closures_schedulers_and_rates_that_are_tensors():
    params, others = parameters(), parameters()
    optimizer, torchs = PagedAdamW(params, lr=torch.tensor(1e-2)), torch_adamw(others, lr=1e-2)
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, 4) for each in (optimizer, torchs)]
    for step in range(4):

        def closure(step=step):
            assert torch.is_grad_enabled()
            give_gradients(step, params, others)
            return 7.0

        assert optimizer.step(closure) == 7.0
        torchs.step()
        for schedule in schedules:
            schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(torchs.param_groups[0]["lr"])
    assert all(torch.equal(optimizer.state[p]["exp_avg"], torchs.state[q]["exp_avg"]) for p, q in zip(params, others))


def test_a_whole_models_parameters_may_be_given():
    frozen = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    wide = nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)
    p = parameters(sizes=[(5,)])
    optimizer = PagedAdamW([frozen, wide, *p])
    give_gradients(0, p)
    optimizer.step()
    assert optimizer.stats()["bytes"] < 2048  # nothing is kept for what is frozen


def test_names_are_kept():
    model = nn.Linear(3, 2)
    optimizer = PagedAdamW(model.named_parameters())
    give_gradients(0, list(model.parameters()))
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_backward_through_a_parameter_that_was_updated_is_refused():
    p = nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    optimizer = PagedAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_may_be_replaced_and_resized_before_the_first_step(tmp_path):
    for options in ({}, {"page_to": tmp_path}):
        p = nn.Parameter(torch.zeros(3))
        optimizer = PagedAdamW([p], **options)
        p.data = torch.ones(5000)
        give_gradients(0, [p])
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].shape == (5000,)
        (other,) = optimizer.param_groups[0]["params"] = parameters(sizes=[(4,)])
        give_gradients(1, [other])
        optimizer.step()
        assert optimizer.state[other]["exp_avg"].shape == (4,)


def test_memory_of_a_parameter_may_move_between_steps():
    params, others = parameters(), parameters()
    optimizer, still = PagedAdamW(params), PagedAdamW(others)
    for step in range(3):
        give_gradients(step, params, others)
        optimizer.step()
        still.step()
        for p in params:
            p.data = p.data.clone()
    assert_same(params, others)


@pytest.mark.slow
def test_compiled_models_and_a_compiled_step():
    torch.manual_seed(0)
    model, plain = nn.Linear(16, 4), nn.Linear(16, 4)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 16)
    compiled = torch.compile(model)
    optimizer, reference = PagedAdamW(model.parameters(), lr=1e-2), PagedAdamW(plain.parameters(), lr=1e-2)
    step = torch.compile(optimizer.step)
    for _ in range(3):
        for each, take in ((compiled, step), (plain, reference.step)):
            each.zero_grad()
            each(x).square().mean().backward()
            take()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)  # the compiled model sums in another order


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
        ({"lr": math.inf}, "lr must be finite"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas must be in \[0, 1\), got -0.1"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": math.nan}, "eps must be finite"),
        ({"weight_decay": -1e-3}, "weight_decay must be finite and not negative, got -0.001"),
        ({"bits": 4}, "bits must be 32 or 8, got 4"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, or None, got 0.0"),
        ({"paging": "always"}, "paging must be one of auto, managed, streamed, got always"),
    ],
)
def test_numbers_outside_their_range(options, message):
    with pytest.raises(ValueError, match=f"^PagedAdamW: {message}"):
        PagedAdamW(parameters(), **options)


@pytest.mark.parametrize(
    "options", [{"lr": None}, {"lr": "fast"}, {"eps": [1]}, {"betas": 0.9}, {"lr": torch.ones(2)}], ids=str
)
def test_what_is_no_number_is_named(options):
    with pytest.raises(
        TypeError, match="^PagedAdamW: lr, eps and weight_decay must be numbers, betas two of them, got"
    ):
        PagedAdamW(parameters(), **options)


@BITS
def test_a_step_that_is_refused_changes_nothing(bits):
    params, others = parameters(), parameters()
    optimizer = PagedAdamW([{"params": params[:2]}, {"params": params[2:]}], bits=bits)
    untouched = PagedAdamW([{"params": others[:2]}, {"params": others[2:]}], bits=bits)
    for step in range(3):
        give_gradients(step, params, others)
        optimizer.param_groups[1]["lr"] = math.nan
        with pytest.raises(ValueError, match="lr must be finite and not negative, got nan"):
            optimizer.step()
        optimizer.param_groups[1]["lr"] = 1e-3
        optimizer.step()
        untouched.step()
    assert_same(params, others)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    params = parameters()
    optimizer = PagedAdamW(params[:2])
    with pytest.raises(TypeError, match="every parameter must be float32, bfloat16 or float16, got float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]})
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": params[2:], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[2:]})


def test_sparse_gradients_are_refused_by_name():
    p = nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (4, 3), check_invariants=True)
    with pytest.raises(RuntimeError, match="every gradient must be dense, got torch.sparse_coo"):
        PagedAdamW([p]).step()


def test_parameters_elsewhere_are_refused_by_name():
    p = nn.Parameter(torch.zeros(4, device="meta"))
    p.grad = torch.zeros(4, device="meta")
    with pytest.raises(ValueError, match="every parameter must be on the CPU or on CUDA, got one on meta"):
        PagedAdamW([p]).step()


# ---- with transformers' Trainer


def trained_by_trainer(folder, steps, resume=None, bits=8):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = nf4lora.prepare(tiny_llama(), r=4, lora_alpha=8)
    rows = [{"input_ids": list(range(i, i + 12)), "labels": list(range(i, i + 12))} for i in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_steps=2, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
        weight_decay=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(PagedAdamW, {"lr": 1e-2, "bits": bits})
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, losses


@pytest.mark.slow
@BITS
def test_trainer_learns_with_it_and_resumes_bit_for_bit(tmp_path, bits):
    whole, losses = trained_by_trainer(tmp_path / "whole", 4, bits=bits)
    assert losses[-1] < losses[0]
    trained_by_trainer(tmp_path / "half", 2, bits=bits)
    resumed, _ = trained_by_trainer(tmp_path / "half", 4, resume=str(tmp_path / "half" / "checkpoint-2"), bits=bits)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
