"""The CUDA kernels of adamw, executed without a GPU: nvcc's PTX for every architecture, launched by the code that
ships, equal to reference.py bit for bit."""

import ctypes
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nf4lora import _C
from nf4lora.ops import reference

from support.ptx import ARCHITECTURES, Device, Launchers, compile_ptx, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "adamw.cu"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NUMBERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


class Numbers(ctypes.Structure):
    """AdamW of csrc/adamw.h."""

    _fields_ = [
        ("weight", ctypes.c_float),
        ("from_gradient", ctypes.c_bool),
        ("beta2", ctypes.c_float),
        ("square_weight", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("negative_step", ctypes.c_float),
        ("correction", ctypes.c_float),
        ("inverse_correction", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("gone", ctypes.c_float),
    ]


def numbers_of(lr, beta1, beta2, eps, weight_decay, step):
    weight, from_gradient = np.float32(1 - beta1), np.float32(1 - beta1) >= 0.5
    correction = np.float32(math.sqrt(1 - beta2**step))
    return Numbers(
        weight - np.float32(1) if from_gradient else weight, bool(from_gradient), beta2, 1 - beta2,
        1 - lr * weight_decay, -np.float32(lr / (1 - beta1**step)), correction, np.float32(1) / correction, eps,
        min(0.5, 4 * (1 - beta1)),
    )  # fmt: skip


class Entry(ctypes.Structure):
    """AdamWTensor of csrc/cuda/launch.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "absmax")] + [
        ("count", ctypes.c_int64)
    ]


def bits_of(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.uint8)).numpy()


class Case:
    """A tensor of a step: what goes in, and where it is on the device."""

    def __init__(self, size, dtype=torch.float32, bits=8, grad=None):
        self.param = torch.randn(size).to(dtype)
        self.grad = (torch.randn(size) * torch.exp(2 * torch.randn(size))).to(dtype) if grad is None else grad.to(dtype)
        if bits == 32:
            self.moments = [torch.randn(size) * 0.1, torch.rand(size) * 0.01, None]
        else:
            first = torch.randint(0, 256, (size,), dtype=torch.uint8)
            second = torch.randint(0, 256, (size,), dtype=torch.uint8)
            self.moments = [first, second, torch.rand(-(-size // 256), 2)]

    def upload(self, device, offset=0):
        self.buffers = [
            None if t is None else device.upload(bits_of(t), o)
            for t, o in zip((self.param, self.grad, *self.moments), [offset, offset, offset, offset, 0], strict=True)
        ]
        return Entry(*(0 if b is None else b.address for b in self.buffers), self.param.numel())

    def download(self):
        out = []
        for buffer, like in zip(self.buffers, (self.param, self.grad, *self.moments), strict=True):
            out.append(None if like is None else torch.from_numpy(buffer.numpy()).view(like.dtype).reshape(like.shape))
        return out[0], *out[2:]


class Adamw:
    def __init__(self, architecture):
        self.device = Device(compile_ptx(SOURCE, architecture))
        self.launchers = Launchers(self.device)

    def step(self, cases, dtype=torch.float32, bits=8, scale=None, offset=0, step=3, compared=True, **numbers):
        """Runs the launcher and asserts that each case has become what the reference makes of it."""
        numbers = NUMBERS | numbers
        entries = (Entry * max(len(cases), 1))(*(case.upload(self.device, offset) for case in cases))
        skipped = self.device.upload(np.zeros(1, np.int64))
        factor = None if scale is None else self.device.upload(np.array([scale], np.float32))
        said = self.launchers.adamw_step(
            ctypes.byref(entries), len(cases), ctypes.c_int(DTYPES[dtype]), ctypes.c_bool(bits == 8),
            ctypes.byref(numbers_of(**numbers, step=step)), factor, skipped, None,
        )  # fmt: skip
        assert said is None
        if not compared:
            return int(skipped.numpy()[0])
        total = 0
        for case in cases:
            if not case.param.numel():
                continue
            *want, count = reference.adamw_step(
                case.param, case.grad, *case.moments, scale=1.0 if scale is None else scale, step=step, **numbers
            )
            total += count
            for name, got, expected in zip(("param", "exp_avg", "exp_avg_sq", "absmax"), case.download(), want):
                if got is not None:
                    differing = (bits_of(got) != bits_of(expected)) & ~(got.isnan() & expected.isnan()).numpy()
                    assert not differing.any(), (
                        name,
                        int(differing.sum()),
                        got[differing][:4],
                        expected[differing][:4],
                    )
        assert skipped.numpy()[0] == total
        return total


@pytest.fixture(scope="module", params=ARCHITECTURES)
def adamw(request):
    return Adamw(request.param)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_is_that_of_the_reference_on_every_architecture(adamw, dtype, bits):
    adamw.step([Case(size, dtype, bits) for size in (1, 256, 515)], dtype, bits)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.39, 0.41])
@pytest.mark.parametrize("beta1", [0.5, 0.9, 0.99])
def test_a_gradient_that_has_ended_lowers_its_moment(beta1, scale):
    """Gradients of this share of their moments, of every code: above and below what counts as ended."""
    codes = torch.arange(1024).remainder(256).to(torch.uint8)
    grad = reference.moment_decode(codes, torch.ones(4), reference.nested_code()) * scale
    case = Case(1024, grad=grad)
    case.moments[0], case.moments[2][:, 0] = codes, 1.0
    Adamw("90a").step([case], beta1=beta1)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 1000, 4096 + 3, 8192 + 5])
def test_sizes_that_no_block_divides(size, bits):
    Adamw("90a").step([Case(size, bits=bits)], bits=bits)


@pytest.mark.parametrize("bits", [32, 8])
def test_memory_that_does_not_begin_at_a_vector(bits):
    Adamw("80").step([Case(1030, bits=bits)], bits=bits, offset=4)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    "numbers",
    [
        {"beta1": 0.3},
        {"beta1": 0.0, "beta2": 0.5},
        {"scale": 0.37},
        {"eps": 1.0},
        {"weight_decay": 0.0},
        {"step": 9999},
    ],
    ids=str,
)
def test_numbers_other_than_the_usual(numbers, bits):
    Adamw("90a").step([Case(700, bits=bits)], bits=bits, **numbers)


@pytest.mark.parametrize("peak", [0.0, 2 - 2**-23, 1.0, 2.0**-99, 2.0**-101, 2.0**-140, 2.0**101, 2.0**120], ids=str)
def test_a_block_of_any_scale(peak):
    # beta1 = 0: exp_avg is the gradient itself, and the block's absmax is `peak`
    grad = torch.rand(512) * peak
    grad[7], grad[300] = peak, -peak
    Adamw("90a").step([Case(512, grad=grad)], beta1=0.0)


MAGNITUDES = [-126, -120, -101, -100, -75, -51, -50, -30, 0, 18, 19, 20, 40, 59, 60, 100, 126]
BEYOND = [
    {},
    {"eps": 0.0},
    {"eps": 1e-20},
    {"eps": 1e-30},
    {"eps": 1e6},
    {"lr": 0.0},
    {"lr": 1e-30},
    {"lr": 1e20, "eps": 1e-20},
]


@pytest.mark.parametrize("numbers", BEYOND, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_magnitudes_at_which_a_root_or_a_quotient_needs_care(dtype, numbers):
    # on either side of where the kernel may do without branches, and zeros of both signs
    first = torch.tensor(MAGNITUDES)
    cases = []
    for second in (2 * first, first.roll(-5)):
        grad = torch.randn(len(first), 256) * torch.exp2(first)[:, None]
        grad[:, ::5] = 0.0
        grad[:, ::10] = -0.0
        case = Case(grad.numel(), dtype, grad=grad.reshape(-1))
        case.param[::3] = -0.0
        case.moments[0][::2], case.moments[1][1::3] = 127, 0
        case.moments[2] = torch.rand(len(first), 2) * torch.exp2(torch.stack([first, second], 1).clamp(max=126))
        cases.append(case)
    Adamw("90a").step(cases, dtype, **numbers)


@pytest.mark.parametrize("bits", [32, 8])
def test_more_tensors_than_one_launch_takes(bits):
    ops = Adamw("90a")
    ops.step([Case(size, bits=bits) for size in [3, 0, 300, 1] * 40], bits=bits)
    assert len(ops.launchers.launches) == 2


@pytest.mark.parametrize("bits", [32, 8])
def test_gradients_that_are_not_finite_are_skipped_and_counted(bits):
    grad = torch.randn(600)
    grad[[0, 31, 255, 256, 599]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf])
    assert Adamw("90a").step([Case(600, bits=bits, grad=grad)], bits=bits) == 5


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_a_damaged_scale_leads_to_no_memory_but_its_own(damage):
    case = Case(768)
    case.grad[300] = math.inf
    case.moments[2][1] = damage
    assert Adamw("90a").step([case], compared=False) == 1


@pytest.mark.parametrize("map_", ["signed", "unsigned"])
def test_thresholds_and_their_neighbours_are_rounded_to_the_nearest(map_):
    code = torch.tensor(_C.NESTED_CODE)[128:] if map_ == "signed" else torch.tensor(_C.SQUARE_CODE)[1:]
    middle = (code[1:] + code[:-1]) / 2
    values = torch.cat([torch.nextafter(middle, torch.tensor(v)) for v in (0.0, 2.0)] + [middle, code])
    rows = -(-values.numel() // 255)
    block = torch.ones(rows, 256)  # the last of each block is its absmax
    block[:, :255] = torch.nn.functional.pad(values, (0, rows * 255 - values.numel()), value=1.0).reshape(rows, 255)
    grad = block.reshape(-1) if map_ == "signed" else block.reshape(-1).sqrt()
    cases = []
    for factor in (1.0, -0.7, 2.0**-126):
        case = Case(grad.numel(), grad=grad * factor)
        zeros = torch.zeros(grad.numel(), dtype=torch.uint8)
        case.moments = [zeros + 127, zeros, torch.zeros(rows, 2)]
        cases.append(case)
    Adamw("90a").step(cases, beta1=0.0, beta2=0.5)


def test_huge_gradients_leave_finite_moments():
    grad = torch.full((256,), 3e38)
    grad[5] = -3e38
    grad[6] = 0.0
    case = Case(256, grad=grad)
    case.moments[2][:] = 3e38
    Adamw("90a").step([case], beta1=0.5)


def test_no_values_launch_nothing():
    ops = Adamw("80")
    assert ops.step([]) == 0
    assert ops.step([Case(0)]) == 0
    assert ops.launchers.launches == []


def test_what_cuda_says_of_a_launch_is_returned():
    ops = Adamw("80")
    entry = Case(256).upload(ops.device)
    ops.launchers.fail_next(1)
    skipped = ops.device.upload(np.zeros(1, np.int64))
    numbers = numbers_of(**NUMBERS, step=1)
    said = ops.launchers.adamw_step(
        ctypes.byref(entry), 1, ctypes.c_int(0), ctypes.c_bool(True), ctypes.byref(numbers), None, skipped, None
    )
    assert said == "an error of the test"
