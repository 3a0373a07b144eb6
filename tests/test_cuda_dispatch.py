"""What a CUDA tensor meets before any kernel runs, without a GPU: the CUDA implementation of an op, called by its
dispatch key on CPU tensors."""

import itertools
from pathlib import Path

import pytest
import torch

from nf4lora import _C
from nf4lora.ops.kernels import dispatch

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
NAMES = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("nf4lora::"))

QWEIGHT, ABSMAX, X = torch.zeros(3, 32, dtype=torch.uint8), torch.ones(3, 1), torch.ones(2, 64)
LINEAR = (QWEIGHT, ABSMAX, None)
GROUP = ([QWEIGHT], [ABSMAX], [None])
FACTORS = ([torch.ones(1, 64)], [torch.ones(3, 1)])
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
    "lora_linear_group": (X, *GROUP, [None], *FACTORS, 1.0, 64),
    "lora_linear_group_backward": ([torch.ones(2, 3)], X, [torch.ones(2, 1)], *GROUP, *FACTORS, 1.0, 64, True),
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
    "lora_linear_group": [(X, *GROUP, [], *FACTORS, 1.0, 64), (X[:, :32], *GROUP, [None], *FACTORS, 1.0, 64)],
    "lora_linear_group_backward": [
        ([], X, [], *GROUP, *FACTORS, 1.0, 64, True),
        ([torch.ones(2, 4)], X, [], *GROUP, *FACTORS, 1.0, 64, True),
    ],
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


def chosen(architecture, direction, tokens, N, K, dtype=torch.bfloat16):
    """The kernel that csrc/cuda/dispatch.cpp takes."""
    number = dispatch.number_of(architecture)
    return _C.cuda_kernel_chosen(number, direction == "backward", dtype in dispatch.TENSOR_CORES, tokens, N, K)


def test_the_table_chooses():
    launch = (Path(__file__).parents[1] / "csrc/cuda/launch.h").read_text()
    assert f"kMostFewRows = {dispatch.FEW_ROWS};" in launch
    table = dispatch.by_direction(dispatch.rules())
    cards, tokens = ("8.0", "8.9", "9.0", "10.0", "99.0"), (1, 2, 16, 17, 127, 128, 255, 256, 4096, 65536)
    for architecture, direction, M, size in itertools.product(cards, ("forward", "backward"), tokens, (1024, 4096)):
        expected = dispatch.first(table, architecture, direction, M, size * size).kernel
        assert chosen(architecture, direction, M, size, size) == expected
        assert chosen(architecture, direction, M, size, size, torch.float16) == expected
        assert dispatch.kernel_for(architecture, direction, M, size * size) == expected
    assert chosen("9.0", "forward", 3, 4096, 4096) == "few"
    assert chosen("9.0", "backward", 3, 4096, 4096) == "fused"
    assert chosen("9.0", "forward", 65536, 4096, 4096) == "dense"


def test_what_the_tables_kernel_cannot_take_is_dense():
    for direction in ("forward", "backward"):
        assert chosen("9.0", direction, 100, 64, 64) == "fused"
        assert chosen("9.0", direction, 2, 4096, 4096, torch.float32) == "dense"
        for tokens, N, K in ((0, 4096, 4096), (2, 0, 4096), (2, 4096, 0)):  # torch knows what a sum over nothing is
            assert chosen("9.0", direction, tokens, N, K) == "dense"
    assert chosen("9.0", "backward", 2, 4095, 4096) == "dense"  # rows of dy that 16-byte copies cannot follow
    assert chosen("9.0", "forward", 20, 4095, 4096) == "fused"


def test_a_kernel_can_be_forced_where_it_fits():
    for name in dispatch.KERNELS:
        with dispatch.forcing(name):
            assert dispatch.forced() == name
            assert chosen("9.0", "forward", 2, 4096, 4096) == name
    message = "the forced kernel must be one of fused, dense here, got 'few'"
    for direction, tokens in (("forward", 17), ("backward", 2)):
        with dispatch.forcing("few"), pytest.raises(ValueError, match=f"lora_linear: {message}"):
            chosen("9.0", direction, tokens, 4096, 4096)
    with pytest.raises(ValueError, match="must be one of few, fused, dense, got quick"), dispatch.forcing("quick"):
        pytest.fail("forced a kernel that is not there")
    assert dispatch.forced() is None
    assert chosen("9.0", "forward", 2, 4096, 4096) == "few"


def test_forcing_within_forcing_ends_where_it_began():
    with dispatch.forcing("dense"):
        with dispatch.forcing("fused"):
            assert chosen("9.0", "forward", 2, 4096, 4096) == "fused"
        assert chosen("9.0", "forward", 2, 4096, 4096) == "dense"


def test_rules_that_are_handed_over_replace_those_before():
    try:
        dispatch.hand_over([dispatch.Rule("*", "forward", "fused", 8, 4096, "a test")])
        assert chosen("9.0", "forward", 8, 64, 64) == "fused"
        assert chosen("9.0", "forward", 9, 64, 64) == chosen("9.0", "forward", 8, 65, 64) == "dense"  # no rule is left
        assert chosen("9.0", "backward", 8, 64, 64) == "dense"
    finally:
        dispatch.hand_over(dispatch.rules())
    assert chosen("9.0", "forward", 9, 64, 64) == "few"


def test_the_work_space_is_set_and_set_back():
    before = _C.cuda_workspace()
    assert before == 512 << 20
    with dispatch.workspace(1 << 20):
        assert _C.cuda_workspace() == 1 << 20
    assert _C.cuda_workspace() == before
