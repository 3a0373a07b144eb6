"""8-bit moments over many steps: what they do to a parameter whose gradient has ended, or goes on.

A moment of 8 bits is rounded after each step. Where the values of its map lie further apart than a step reaches, the
nearest is the one it had, and it never dies out; see kMomentDrop in csrc/format.h.
"""

import warnings

import pytest
import torch

from nf4lora import _C, ops
from nf4lora.ops import reference

from support.bits import assert_same_bits

COUNT, STILL = 2048, 50  # values; steps after which half of the gradients change
SEEDS = range(3)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def gradients(seed, steps, factor=0.0, spread=0.0, changing=False):
    """Of each step; every second one is multiplied by `factor` after STILL steps.

    spread: of the logarithm of their sizes within a block; changing: drawn anew in each step
    """
    rng = generator(seed)
    size = torch.exp(spread * torch.randn(COUNT, generator=rng))
    drawn = torch.randn(COUNT, generator=rng)
    for step in range(steps):
        if changing:
            drawn = torch.randn(COUNT, generator=rng)
        grad = drawn * size
        if step >= STILL:
            grad[::2] *= factor
        yield grad


def of_ours(grads, bits=8, beta1=0.9):
    """The change of a parameter in each step, in learning rates: [steps, COUNT]."""
    param = torch.zeros(COUNT)
    moments = [torch.zeros(COUNT), torch.zeros(COUNT)]
    absmaxs = []
    if bits == 8:
        moments = [torch.full((COUNT,), 127, dtype=torch.uint8), torch.zeros(COUNT, dtype=torch.uint8)]
        absmaxs = [torch.zeros(COUNT // 256, 2)]
    skipped, changes = torch.zeros(1, dtype=torch.int64), []
    for step, grad in enumerate(grads, 1):
        param.zero_()  # so that the change is not lost to the parameter's rounding
        numbers = {"lr": 1.0, "beta1": beta1, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": step}
        ops.adamw_step_([param], [grad], moments[:1], moments[1:], absmaxs, skipped, **numbers)
        changes.append(param.clone())
    return torch.stack(changes)


def of_bitsandbytes(grads, beta1=0.9):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optim = pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes is not installed")
    param = torch.nn.Parameter(torch.zeros(4096))  # fewer values it keeps in 32 bits
    optimizer, changes = optim.AdamW8bit([param], lr=1.0, betas=(beta1, 0.999), weight_decay=0.0), []
    for grad in grads:
        param.data.zero_()
        param.grad = torch.nn.functional.pad(grad, (0, 4096 - COUNT))
        optimizer.step()
        changes.append(param.detach()[:COUNT].clone())
    return torch.stack(changes)


def drift(changes, exact):
    """By how much each of the values whose gradient changed moves too far, in learning rates a step."""
    return (changes - exact)[STILL + 100 :, ::2].mean(dim=0).abs()


# ---- gradients that end


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_a_parameter_whose_gradient_has_ended_stands_still(instruction_set, spread):
    """torch's has moved by 0.9^100 of a step by then. Half of these used to move by up to 1.3 learning rates a step."""
    for seed in SEEDS:
        changes = of_ours(gradients(seed, 250, spread=spread))
        assert changes[STILL - 1].abs().median() > 0.5
        assert changes[STILL + 100 :, ::2].abs().max() < 1e-3
        assert changes[-1, 1::2].abs().median() > 0.5  # the others go on


@pytest.mark.slow
@pytest.mark.parametrize("beta1", [0.5, 0.9, 0.95, 0.99])
def test_a_moment_whose_gradient_has_ended_reaches_zero(instruction_set, beta1):
    """Beside one that stays, so that the scale does. Steps: those of beta1 down to the smallest code, and as many."""
    codes = [torch.full((256,), 127, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)]
    param, absmax, skipped = torch.zeros(256), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    numbers = {"lr": 1.0, "beta1": beta1, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    grad = torch.linspace(-1, 1, 256)
    before = torch.full((256,), torch.inf)
    for step in range(1, 60 + int(30 / (1 - beta1))):
        if step == 60:
            grad[:-1] = 0.0
        ops.adamw_step_([param], [grad], codes[:1], codes[1:], [absmax], skipped, **numbers, step=step)
        size = reference.moment_decode(codes[0], absmax[:, 0], reference.nested_code()).abs()
        if step > 60:
            assert (size[:-1] < before[:-1]).logical_or(size[:-1] == 0).all(), step
        before = size
    assert (codes[0][:-1] == 127).all()
    assert codes[0][-1] == 255


@pytest.mark.parametrize("changing", [False, True], ids=["still", "changing"])
@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize("factor", [0.0, 0.01])
def test_drift_is_no_more_than_that_of_bitsandbytes(factor, spread, changing):
    of_seeds = []
    for seed in SEEDS:
        grads = list(gradients(seed, 250, factor, spread, changing))
        exact = of_ours(grads, bits=32)
        each = [drift(changes, exact) for changes in (of_ours(grads), of_bitsandbytes(grads))]
        of_seeds.append([torch.stack([found.max(), found.mean()]) for found in each])
    ours, theirs = (torch.stack(column).mean(dim=0) for column in zip(*of_seeds))
    # 1e-3 of a learning rate: where gradients change from step to step, both are what is left of the exact run
    assert (ours <= theirs + 1e-3).all(), (ours, theirs)
    if not factor:
        assert ours.max() < 1e-3


# ---- gradients that go on


@pytest.mark.parametrize("noise", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_a_gradient_that_goes_on_is_followed_as_closely_as_bitsandbytes_does(noise, spread):
    """A fixed part and noise: what ends a moment must not take hold of one that only fluctuates."""
    errors = []
    for seed in SEEDS:
        rng = generator(seed)
        size = torch.exp(spread * torch.randn(COUNT, generator=rng))
        fixed = torch.randn(COUNT, generator=rng)
        grads = [size * (fixed + noise * torch.randn(COUNT, generator=rng)) for _ in range(150)]
        exact = of_ours(grads, bits=32)
        found = [changes[50:] - exact[50:] for changes in (of_ours(grads), of_bitsandbytes(grads))]
        errors.append([each.abs().mean() for each in found])
    ours, theirs = torch.tensor(errors).mean(dim=0)
    assert ours <= 1.02 * theirs, (ours, theirs)  # equal to rounding where both do the same


@pytest.mark.parametrize("beta1", [0.9, 0.99])
@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_steps_are_not_made_shorter_by_what_ends_a_moment(beta1, noise):
    """Their mean length beside that of bitsandbytes, whose moments are rounded to the nearest alone."""
    for seed in SEEDS:
        rng = generator(seed)
        fixed = torch.randn(COUNT, generator=rng)
        grads = [fixed + noise * torch.randn(COUNT, generator=rng) for _ in range(200)]
        lengths = [each[100:].abs().mean() for each in (of_ours(grads, 8, beta1), of_bitsandbytes(grads, beta1))]
        assert abs(lengths[0] / lengths[1] - 1) < 0.03


@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("changing", [False, True], ids=["still", "changing"])
def test_no_step_explodes(spread, changing):
    """exp_avg_sq is never stored as zero, so nothing is divided by eps alone; torch's steps stay below 1 to 3."""
    for seed in SEEDS:
        changes = of_ours(gradients(seed, 200, spread=spread, changing=changing))
        assert changes.isfinite().all()
        assert changes.abs().max() < 10


# ---- the codes


def test_a_drop_reaches_the_next_smaller_value():
    """And no further, where the two belong to one level of the map."""
    code, drop = torch.tensor(_C.NESTED_CODE), reference.moment_drop()
    assert (drop.view(torch.int32) & 0xFFFF == 0).all()
    smaller = torch.cat([code[1:128], code[127:128], code[127:255]])
    reached = code[reference.nearest(code - drop, code)]
    within_a_level = smaller.abs() > 0.5 * code.abs()
    assert within_a_level.sum() > 200
    assert_same_bits(reached[within_a_level], smaller[within_a_level])
    assert ((code - drop).abs() < (code + smaller).abs() / 2).logical_or(code == 0).all()


def test_a_first_moment_below_half_of_its_smallest_code_becomes_zero(instruction_set):
    smallest = reference.nested_code()[128]
    half = (smallest / 2).item()
    grad = torch.tensor([1.0, half, -half, 1.01 * half, -1.01 * half, 1e-30, -1e-30])
    codes = [torch.full((7,), 127, dtype=torch.uint8), torch.zeros(7, dtype=torch.uint8)]
    numbers = {"lr": 1.0, "beta1": 0.0, "beta2": 0.5, "eps": 1e-8, "weight_decay": 0.0}
    absmax = torch.zeros(1, 2)
    ops.adamw_step_(
        [torch.zeros(7)], [grad], codes[:1], codes[1:], [absmax], torch.zeros(1, dtype=torch.int64), **numbers
    )
    assert codes[0].tolist() == [255, 127, 127, 128, 126, 127, 127]
    assert codes[1].tolist() == [255, 1, 1, 1, 1, 0, 0]  # the square of 1e-30 is zero in float32
