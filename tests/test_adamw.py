"""adamw_step_: one step of AdamW, in 32 and in 8 bits."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf4lora import _C, ops
from nf4lora.ops import reference

from support.bits import assert_same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# SHA-256 of the 256 float32 values of bitsandbytes' create_dynamic_map(signed=False).
SQUARE_DIGEST = "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"
SIZES = [1, 7, 255, 256, 257, 1000, 4096 + 3, 40_000]


class State:
    """A parameter, its gradient and its moments after two steps, so that the moments are worth something."""

    def __init__(self, size, dtype=torch.float32, bits=32, device="cpu", spread=3.0):
        self.param = torch.randn(size).to(dtype).to(device)
        self.grads = [
            (torch.randn(size) * torch.exp(spread * torch.randn(size))).to(dtype).to(device) for _ in range(3)
        ]
        if bits == 32:
            self.exp_avg, self.exp_avg_sq = torch.zeros(2, size, device=device)
            self.absmax = None
        else:
            self.exp_avg = torch.full((size,), 127, dtype=torch.uint8, device=device)
            self.exp_avg_sq = torch.zeros(size, dtype=torch.uint8, device=device)
            self.absmax = torch.zeros(-(-size // 256), 2, device=device)

    def tensors(self):
        return self.param, self.exp_avg, self.exp_avg_sq, self.absmax


def both(state, grad, **numbers):
    """The op in place, and what the reference makes of the same state (which is left on the CPU)."""
    scale = numbers.pop("scale", None)
    numbers = NUMBERS | numbers
    before = [None if t is None else t.cpu() for t in state.tensors()]
    expected = reference.adamw_step(
        before[0], grad.cpu(), *before[1:], scale=1.0 if scale is None else scale, **numbers
    )
    device = state.param.device
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    absmaxs = [] if state.absmax is None else [state.absmax]
    factor = None if scale is None else torch.tensor([scale], device=device)
    ops.adamw_step_([state.param], [grad], [state.exp_avg], [state.exp_avg_sq], absmaxs, skipped, factor, **numbers)
    return expected, int(skipped)


def assert_is(state, expected, skipped):
    for got, want in zip(state.tensors(), expected, strict=False):
        if got is not None:
            assert_same_bits(got.cpu(), want)
    assert skipped == expected[-1]


# ---- against the definition


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_three_steps_are_those_of_the_reference(device, size, dtype, bits):
    state = State(size, dtype, bits, device)
    for step, grad in enumerate(state.grads, 1):
        assert_is(state, *both(state, grad, step=step))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_instruction_set_takes_the_same_step(instruction_set, dtype, bits):
    state = State(4096 + 259, dtype, bits)
    for step, grad in enumerate(state.grads, 1):
        assert_is(state, *both(state, grad, step=step))


def test_every_instruction_set_rounds_bfloat16_parameters_to_nearest_even(instruction_set):
    state = State(1000, torch.bfloat16, 8)
    assert_is(state, *both(state, state.grads[0]))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    "numbers",
    [
        {"beta1": 0.5}, {"beta1": 0.0}, {"beta1": 0.3, "beta2": 0.0}, {"beta2": 0.95},
        {"weight_decay": 0.0}, {"lr": 0.0},
        {"eps": 1.0}, {"scale": 0.37}, {"scale": 0.0}, {"step": 10_000}, {"step": 16_600},
        {"scale": math.nan}, {"scale": -math.inf},
        {"lr": 3.0, "weight_decay": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_other_than_the_usual(device, bits, numbers):
    state = State(1300, bits=bits, device=device)
    both(state, state.grads[0])
    assert_is(state, *both(state, state.grads[1], **{"step": 2} | numbers))


def test_a_correction_with_a_mantissa_of_ones_stays_within_an_ulp_of_the_denominator():
    step = next(t for t in range(10_000, 40_000) if torch.tensor((1 - 0.999**t) ** 0.5).item() == 1 - 2**-24)
    state = State(40_000)
    expected, _ = both(state, state.grads[0], step=step)
    assert_same_bits(state.exp_avg_sq, expected[2])
    assert (state.param - expected[0]).abs().max() <= 2**-23 * expected[0].abs().max()


@given(st.integers(1, 700), st.integers(0, 2**31), st.sampled_from([8, 32]), st.floats(-40, 40))
def test_any_size_and_any_scale_of_gradients(size, seed, bits, exponent):
    torch.manual_seed(seed)
    state = State(size, bits=bits)
    for step in (1, 2):
        grad = state.grads[step] * 2.0**exponent
        assert_is(state, *both(state, grad, step=step))


# ---- against torch


def torch_adamw(param, grads, **options):
    param = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([param], foreach=False, fused=False, **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.95)])
def test_moments_are_those_of_torch_to_the_bit(betas):
    state = State(100_003)
    _, theirs = torch_adamw(state.param, state.grads, lr=1e-2, betas=betas, weight_decay=0.1)
    for step, grad in enumerate(state.grads, 1):
        both(state, grad, step=step, beta1=betas[0], beta2=betas[1])
    assert_same_bits(state.exp_avg, theirs["exp_avg"])
    assert_same_bits(state.exp_avg_sq, theirs["exp_avg_sq"])


def test_parameters_are_those_of_torch_to_the_bit_where_its_root_is_exact(monkeypatch):
    """MKL's square root, which torch takes on this processor or not, may err by an ulp; ours is correctly rounded."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda self: self.double().pow(0.5).float())
    state = State(100_003)
    wanted, _ = torch_adamw(state.param, state.grads, lr=1e-2, weight_decay=0.1)
    for step, grad in enumerate(state.grads, 1):
        both(state, grad, step=step)
    assert_same_bits(state.param, wanted)


def test_parameters_are_within_an_ulp_of_torch_but_for_its_root():
    """One ulp of max(|p|, |update|) from our rounding and one each from what MKL's root does to update and sum."""
    state = State(100_003)
    before = state.param.clone()
    wanted, _ = torch_adamw(state.param, state.grads[:1], lr=1e-2, weight_decay=0.1)
    both(state, state.grads[0])
    largest = torch.maximum(before.abs(), (wanted - before).abs())
    ulp = 2.0 ** (torch.floor(torch.log2(largest)) - 23)
    distance = (state.param - wanted).abs() / ulp
    assert distance.max() <= 2
    assert (distance > 1).float().mean() < 1e-2


# ---- 8 bits


def test_the_map_of_second_moments_is_that_of_bitsandbytes():
    code = torch.tensor(_C.SQUARE_CODE)
    assert_same_bits(code, reference.square_code())
    assert hashlib.sha256(code.numpy().tobytes()).hexdigest() == SQUARE_DIGEST
    functional = pytest.importorskip("bitsandbytes.functional")
    assert_same_bits(code, functional.create_dynamic_map(signed=False))


def encoded(device, values):
    """What a moment of these values is stored as: beta1 = beta2 = 0 makes the first moment the gradient."""
    state = State(values.numel(), bits=8, device=device)
    both(state, values.to(device), beta1=0.0, beta2=0.999)
    return state


@pytest.mark.parametrize("map_", ["signed", "unsigned"])
def test_thresholds_and_their_neighbours_are_rounded_to_the_nearest(device, instruction_set, map_):
    code = torch.tensor(_C.NESTED_CODE)[127:] if map_ == "signed" else torch.tensor(_C.SQUARE_CODE)[1:]
    middle = (code[1:] + code[:-1]) / 2
    values = torch.cat([torch.nextafter(middle, torch.tensor(v)) for v in (0.0, 2.0)] + [middle, code])
    rows = -(-values.numel() // 255)
    block = torch.ones(rows, 256)  # the last of each block is its absmax
    block[:, :255] = torch.nn.functional.pad(values, (0, rows * 255 - values.numel()), value=1.0).reshape(rows, 255)
    for absmax in (1.0, 0.7, 3e-30, 2.0**-126):
        for sign in (1.0, -1.0):
            grad = (block * absmax * sign).reshape(-1)
            state = State(grad.numel(), bits=8, device=device)
            if map_ == "unsigned":
                grad = grad.abs().sqrt()
            assert_is(state, *both(state, grad.to(device), beta1=0.0, beta2=0.5))


def test_a_second_moment_that_is_not_zero_is_not_stored_as_zero_and_a_first_keeps_its_sign(device):
    values = torch.tensor([1.0, -1e-9, 1e-9, 0.0, -0.0, -1e-30, 1e-38, -1.0, 1e-45, 1e-6, -1e-6])
    state = encoded(device, values)
    stored = torch.tensor(_C.NESTED_CODE)[state.exp_avg.cpu().long()]
    assert_same_bits(stored.sign(), torch.where(values.abs() < 1e-7, 0.0, values.sign()))
    assert state.exp_avg[7] == 0
    assert state.exp_avg[0] == 255
    squares = values.square() * (1 - 0.999)
    assert_same_bits(state.exp_avg_sq.cpu() > 0, squares > 0)


def test_a_block_of_zeros_has_codes_of_zero(device):
    state = encoded(device, torch.cat([torch.zeros(256), torch.ones(3)]))
    assert state.absmax[0].tolist() == [0.0, 0.0]
    assert (state.exp_avg[:256] == 127).all()
    assert (state.exp_avg_sq[:256] == 0).all()


def test_a_block_knows_nothing_of_its_neighbours(device):
    state, alone = State(600, bits=8, device=device), State(600, bits=8, device=device)
    alone.param.copy_(state.param)
    grad = state.grads[0].clone()
    both(state, grad)
    grad[300] = 1e20
    both(alone, grad)
    for got, want in zip(alone.tensors(), state.tensors(), strict=True):
        rows = slice(256) if got.dim() == 1 else slice(1)
        assert_same_bits(got[rows], want[rows])
    assert alone.absmax[1, 0] > 1e18


def test_huge_gradients_leave_finite_moments(device):
    state = State(256, bits=8, device=device)
    grad = torch.full((256,), 3e38, device=device)
    for step in (1, 2, 3):
        assert_is(state, *both(state, -grad if step == 2 else grad, step=step))
    assert state.absmax.isfinite().all()
    assert state.param.isfinite().all()


@pytest.mark.parametrize("peak", [0.0, 2 - 2**-23, 1.0, 2.0**-99, 2.0**-101, 2.0**-140, 2.0**101, 2.0**120], ids=str)
def test_a_block_of_any_scale(device, peak):
    # beta1 = 0: exp_avg is the gradient itself, and the block's absmax is `peak`
    state = State(2048, bits=8, device=device)
    grad = torch.rand(2048, device=device) * peak
    grad[[7, 300]] = torch.tensor([peak, -peak], device=device)
    assert_is(state, *both(state, grad, beta1=0.0))


# ---- gradients that are not finite


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(device, bits, bad):
    state = State(1025, bits=bits, device=device)
    both(state, state.grads[0])
    before = state.param.clone()
    grad = state.grads[1].clone()
    grad[[0, 255, 1024]] = bad
    expected, skipped = both(state, grad, step=2)
    assert skipped == 3
    assert_is(state, expected, skipped)
    assert_same_bits(state.param[[0, 255, 1024]], before[[0, 255, 1024]])
    assert state.param.isfinite().all()


def test_a_scale_that_is_not_finite_skips_everything(device):
    state = State(304, device=device)
    before = state.param.clone()
    assert both(state, state.grads[0], scale=math.nan)[1] == 304
    assert_same_bits(state.param, before)


@pytest.mark.parametrize("damage", [math.nan, math.inf, -1.0])
def test_a_damaged_scale_harms_its_own_block_only(device, instruction_set, damage):
    state, sound = State(1024, bits=8, device=device), State(1024, bits=8, device=device)
    sound.param.copy_(state.param)
    for each in (state, sound):
        both(each, state.grads[0])
    state.absmax[1] = damage
    grad = state.grads[1].clone()
    grad[300] = math.inf  # keeps a moment that may be no number
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    for each in (state, sound):
        moments = [each.exp_avg], [each.exp_avg_sq], [each.absmax]
        ops.adamw_step_([each.param], [grad], *moments, skipped, **NUMBERS, step=2)
    assert skipped == 2
    for got, want in zip(state.tensors(), sound.tensors(), strict=True):
        for block in (0, 2, 3):
            assert_same_bits(got.view(4, -1)[block], want.view(4, -1)[block])


# ---- many tensors


@pytest.mark.parametrize("bits", [32, 8])
def test_many_tensors_are_as_many_calls(device, bits):
    sizes, dtypes = [5, 0, 70_000, 256, 1, 4096, 12_345] * 20, DTYPES * 50
    states = [State(size, dtype, bits, device) for size, dtype in zip(sizes, dtypes, strict=False)]
    expected = []
    for state in states:
        before = [None if t is None else t.cpu() for t in state.tensors()]
        expected.append(reference.adamw_step(before[0], state.grads[0].cpu(), *before[1:], **NUMBERS))
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    ops.adamw_step_(
        [s.param for s in states], [s.grads[0] for s in states], [s.exp_avg for s in states],
        [s.exp_avg_sq for s in states], [s.absmax for s in states if bits == 8], skipped, **NUMBERS,
    )  # fmt: skip
    for state, want in zip(states, expected, strict=True):
        assert_is(state, want, want[-1])
    assert skipped == sum(want[-1] for want in expected)


def test_threads_change_nothing():
    threads = torch.get_num_threads()
    states = []
    try:
        for count in (1, threads + 1):
            torch.manual_seed(3)
            torch.set_num_threads(count)
            states.append(State(300_000, bits=8))
            both(states[-1], states[-1].grads[0])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(states[0].tensors(), states[1].tensors(), strict=True):
        assert_same_bits(a, b)


def test_memory_that_does_not_begin_at_a_vector(device):
    whole = State(1030, bits=8, device=device)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:] for t in (whole.param, whole.grads[0])]
    param, grad = (s.copy_(t) for s, t in zip(shifted, (whole.param, whole.grads[0]), strict=True))
    other = State(1030, bits=8, device=device)
    other.param = param
    assert_is(other, *both(other, grad))


# ---- errors


def call(**changed):
    state = State(300, bits=8)
    arguments = {
        "params": [state.param], "grads": [state.grads[0]], "exp_avgs": [state.exp_avg],
        "exp_avg_sqs": [state.exp_avg_sq], "absmaxs": [state.absmax], "skipped": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    ops.adamw_step_(**arguments | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "adamw_step_: lr must be finite and not negative, got -1"),
        ({"lr": math.nan}, ValueError, "lr must be finite"),
        ({"beta1": 1.0}, ValueError, "beta1 must be in [0, 1), got 1"),
        ({"beta2": -0.1}, ValueError, "beta2 must be in [0, 1), got -0.1"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be finite and not negative, got inf"),
        ({"step": 0}, ValueError, "step must count from 1, got 0"),
        ({"grads": []}, ValueError, "grads must be as many as params, 1, got 0"),
        ({"absmaxs": [torch.zeros(2, 2)] * 2}, ValueError, "must be as many as params, 1, got 2"),
        ({"absmaxs": []}, TypeError, "every exp_avg (without absmaxs) must be float32, got uint8"),
        ({"exp_avgs": [torch.zeros(300)]}, TypeError, "every exp_avg (with absmaxs) must be uint8, got float32"),
        ({"params": [torch.zeros(300, dtype=torch.float64)]}, TypeError, "got float64"),
        ({"grads": [torch.zeros(300).half()]}, TypeError, "every grad (as its param) must be float32, got float16"),
        ({"grads": [torch.zeros(301)]}, ValueError, "grads[0] must hold 300 values, got shape [301]"),
        ({"grads": [torch.zeros(600)[::2]]}, ValueError, "grads[0] must be contiguous"),
        ({"absmaxs": [torch.zeros(1, 2)]}, ValueError, "absmaxs[0] must hold 4 values, got shape [1, 2]"),
        ({"skipped": torch.zeros(1)}, TypeError, "skipped must be int64, got float32"),
        ({"skipped": torch.zeros(2, dtype=torch.int64)}, ValueError, "skipped must hold one value, got shape [2]"),
        ({"scale": torch.zeros(1).half()}, TypeError, "scale must be float32, got float16"),
        ({"scale": torch.zeros(2)}, ValueError, "scale must hold one value, got shape [2]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_say_what_they_must_be(changed, error, message):
    with pytest.raises(error) as caught:
        call(**changed)
    assert message in str(caught.value)


@pytest.mark.parametrize("bits", [32, 8])
def test_opcheck(bits):
    state = State(300, bits=bits)
    lists = [[state.param], [state.grads[0]], [state.exp_avg], [state.exp_avg_sq], [state.absmax] if bits == 8 else []]
    numbers = (torch.zeros(1, dtype=torch.int64), torch.ones(1), 1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    torch.library.opcheck(torch.ops.nf4lora.adamw_step_.default, (*lists, *numbers))


def test_compiled_step_is_the_eager_one():
    state = State(700, bits=8)

    @torch.compile(fullgraph=True)
    def step(param, grad, exp_avg, exp_avg_sq, absmax, skipped):
        ops.adamw_step_([param], [grad], [exp_avg], [exp_avg_sq], [absmax], skipped, **NUMBERS)

    want = reference.adamw_step(state.param, state.grads[0], *state.tensors()[1:], **NUMBERS)
    step(state.param, state.grads[0], *state.tensors()[1:], torch.zeros(1, dtype=torch.int64))
    assert_is(state, want, 0)
