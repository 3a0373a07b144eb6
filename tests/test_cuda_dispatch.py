"""What a CUDA tensor meets before any kernel runs, without a GPU: the CUDA implementation of an op, called by its
dispatch key on CPU tensors."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from nf4lora import _C
from nf4lora.ops.kernels.dispatch import kernel_for

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
NAMES = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("nf4lora::"))

QWEIGHT, ABSMAX, X = torch.zeros(3, 32, dtype=torch.uint8), torch.ones(3, 1), torch.ones(2, 64)
LINEAR = (QWEIGHT, ABSMAX, None)
SKIPPED, NUMBERS = torch.zeros(1, dtype=torch.int64), (1e-3, 0.9, 0.999, 1e-8, 0.01, 1)


def flat():
    return [torch.zeros(5)]


GOOD = {
    "adamw_step_": (flat(), flat(), flat(), flat(), [], SKIPPED, None, *NUMBERS),
    "nf4_quantize": (X, 64),
    "nf4_dequantize": (QWEIGHT, ABSMAX, 64, torch.float32),
    "nf4_dequantize.out": (QWEIGHT, ABSMAX, 64),
    "absmax_quantize": (ABSMAX,),
    "absmax_dequantize": (torch.zeros(5, dtype=torch.uint8), torch.ones(2)),
    "lora_linear": (X, *LINEAR, None, None, None, 1.0, 0.0, None, 64),
    "lora_linear_backward": (torch.ones(2, 3), X, X[:, :0], *LINEAR, None, None, 1.0, 0.0, None, 64, True),
}
BAD = {
    "adamw_step_": [
        (flat(), [], flat(), flat(), [], SKIPPED, None, *NUMBERS),
        (flat(), [torch.zeros(5).half()], flat(), flat(), [], SKIPPED, None, *NUMBERS),
        (flat(), flat(), flat(), flat(), [], SKIPPED, None, -1.0, *NUMBERS[1:]),
        (flat(), flat(), flat(), flat(), [], SKIPPED.int(), None, *NUMBERS),
    ],
    "nf4_quantize": [(X, 48), (X.int(), 64), (torch.ones(2, 65), 64)],
    "nf4_dequantize": [(QWEIGHT, ABSMAX[:2], 64, torch.float32), (QWEIGHT, ABSMAX, 64, torch.float64)],
    "nf4_dequantize.out": [(QWEIGHT, ABSMAX.half(), 64)],
    "absmax_quantize": [(ABSMAX.half(),)],
    "absmax_dequantize": [(torch.zeros(5, dtype=torch.uint8), torch.ones(3))],
    "lora_linear": [(X[:, :32], *LINEAR, None, None, None, 1.0, 0.0, None, 64)],
    "lora_linear_backward": [(torch.ones(2, 4), X, X[:, :0], *LINEAR, None, None, 1.0, 0.0, None, 64, True)],
}


def call(name, arguments, key):
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.nf4lora, packet), overload or "default")
    keywords = {"out": torch.empty(3, 64)} if overload == "out" else {}
    return op(*arguments, **keywords) if key is None else op.redispatch(key, *arguments, **keywords)


def test_every_op_is_tried():
    assert [n.removeprefix("nf4lora::") for n in NAMES] == sorted(GOOD) == sorted(BAD)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_cuda_key_has_a_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nf4lora::{name}", "CUDA")


@pytest.mark.skipif(bool(_C.CUDA_VERSION), reason="built with CUDA")
@pytest.mark.parametrize("name", sorted(GOOD))
def test_build_without_cuda_says_how_to_get_it(name):
    with pytest.raises(RuntimeError, match=rf"^{name.split('.')[0]}: a CUDA tensor needs .* put nvcc on PATH"):
        call(name, GOOD[name], CUDA)


@pytest.mark.skipif(not _C.CUDA_VERSION, reason="built without CUDA")
@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_arguments_read_the_same_on_both_devices(name):
    call(name, GOOD[name], None)
    for arguments in BAD[name]:
        with pytest.raises((TypeError, ValueError)) as on_cpu:
            call(name, arguments, None)
        with pytest.raises(type(on_cpu.value)) as on_cuda:
            call(name, arguments, CUDA)
        assert str(on_cuda.value) == str(on_cpu.value)


@pytest.mark.skipif(not _C.CUDA_VERSION, reason="built without CUDA")
@pytest.mark.parametrize("kernel", ["few", "gemm"])
@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_backward"])
def test_every_kernel_checks_in_the_same_words(op, kernel):
    name = op.replace("lora_linear", f"lora_linear_{kernel}")
    if name == "lora_linear_few_backward":
        pytest.skip("the kernel for a few rows has no backward")
    for arguments in BAD[op]:
        with pytest.raises((TypeError, ValueError)) as on_cpu:
            call(op, arguments, None)
        with pytest.raises(type(on_cpu.value)) as on_cuda:
            getattr(torch.ops.nf4lora_cuda, name).default.redispatch(CUDA, *arguments)
        assert str(on_cuda.value) == str(on_cpu.value)


class OnCard:
    """What a tensor on a card says of itself."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.shape, self.dtype = torch.Size(shape), dtype

    def numel(self):
        return self.shape.numel()

    def dim(self):
        return len(self.shape)


@pytest.fixture
def cuda():
    """The module that chooses."""
    if not _C.CUDA_VERSION:
        pytest.skip("built without CUDA")
    from nf4lora.ops.kernels import dispatch

    return dispatch


@pytest.fixture
def on(cuda, monkeypatch):
    """on(architecture): the card that every device is."""

    def be(architecture):
        monkeypatch.setattr(cuda, "_architecture", lambda device: architecture)

    return be


def test_the_table_chooses(cuda, on):
    launch = (Path(__file__).parents[1] / "csrc/cuda/launch.h").read_text()
    assert f"kMostFewRows = {cuda.FEW_ROWS};" in launch
    W, small = OnCard(4096, 2048, dtype=torch.uint8), OnCard(1024, 512, dtype=torch.uint8)
    for architecture, direction in itertools.product(("8.0", "8.9", "9.0", "10.0", "99.0"), ("forward", "backward")):
        on(architecture)
        for shape in ((16, 4096), (2, 8, 4096), (4096,), (0, 4096), (17, 4096), (4, 1024, 4096), (65536, 4096)):
            tokens = math.prod(shape[:-1])
            for weight, count in ((W, 4096 * 4096), (small, 1024 * 1024)):
                # Without rows torch knows what a sum over nothing is.
                expected = kernel_for(architecture, direction, tokens, count) if tokens else "unfused"
                assert cuda.chosen(direction, OnCard(*shape, dtype=torch.float16), weight) == expected
    on("9.0")
    assert cuda.chosen("forward", OnCard(3, 4096), W) == "few"
    assert cuda.chosen("backward", OnCard(3, 4096), W) == "fused"
    assert cuda.chosen("forward", OnCard(65536, 4096), W) == "sliced"


def test_what_the_tables_kernel_cannot_take_is_sliced(cuda, on):
    on("9.0")
    W, odd = OnCard(4096, 2048, dtype=torch.uint8), OnCard(4095, 2048, dtype=torch.uint8)
    small = OnCard(64, 32, dtype=torch.uint8)
    for direction in ("forward", "backward"):
        assert cuda.chosen(direction, OnCard(2**26, 64), small) == "fused"  # whatever the rows
        assert cuda.chosen(direction, OnCard(2, 4096, dtype=torch.float32), W) == "sliced"
    for none_or_odd in (odd, OnCard(0, 2048, dtype=torch.uint8)):  # rows of dy that 16-byte copies cannot follow
        assert cuda.chosen("backward", OnCard(2, 4096), none_or_odd) == "sliced"
    assert cuda.chosen("forward", OnCard(20, 4096), odd) == "fused"


def test_what_the_check_refuses_does_not_reach_the_table(cuda):
    x, qweight = torch.ones(1, 64, dtype=torch.bfloat16), torch.zeros(8, 32).byte()
    assert cuda.chosen("forward", x, qweight) == "unfused"
    assert cuda.chosen("forward", OnCard(1, 64), OnCard(64, dtype=torch.uint8)) == "unfused"


def test_a_kernel_can_be_forced_where_it_fits(cuda):
    W = OnCard(4096, 2048, dtype=torch.uint8)
    for name in cuda.KERNELS:
        with cuda.forcing(name):
            assert cuda.chosen("forward", OnCard(2, 4096), W) == name
    for name, tokens in (("few", 17), ("quick", 17)):
        message = rf"the forced kernel must be one of fused, sliced, unfused here, got '{name}'"
        with cuda.forcing(name), pytest.raises(ValueError, match=message):
            cuda.chosen("forward", OnCard(tokens, 4096), W)
    assert cuda.forced() is None


@pytest.mark.skipif(not _C.CUDA_VERSION, reason="built without CUDA")
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(n0=2), ValueError, r"out must lie in W \[3, 64\], got shape \[2, 64\] from row 2 and column 0"),
        (dict(n0=-1), ValueError, "from row -1"),
        (dict(k0=32), ValueError, "and column 32"),
        (dict(k0=16), ValueError, "k0 and the columns of out must be multiples of 32, got 16 and 64"),
        (dict(out=torch.empty(64, 2).T), ValueError, "out must be .* contiguous"),
        (dict(out=torch.empty(2, 64).double()), TypeError, "out must be float32, bfloat16 or float16, got float64"),
        (dict(absmax=ABSMAX[:2]), ValueError, "absmax must hold 3 values"),
        (dict(absmax=ABSMAX.half()), TypeError, "absmax must be float32, or uint8 with nested, got float16"),
        (dict(blocksize=48), ValueError, "blocksize must be a power of two"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_slice_that_is_not_there_is_refused(change, kind, message):
    good = dict(qweight=QWEIGHT, absmax=ABSMAX, nested=None, blocksize=64, n0=0, k0=0, out=torch.empty(2, 64))
    with pytest.raises(kind, match=f"^lora_slice: .*{message}"):
        torch.ops.nf4lora_cuda.lora_slice.default.redispatch(CUDA, *(good | change).values())
