"""What a CUDA tensor meets before any kernel runs, without a GPU: the CUDA implementation of an op, called by its
dispatch key on CPU tensors."""

from pathlib import Path

import pytest
import torch

from nf4lora import _C

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
NAMES = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("nf4lora::"))

QWEIGHT, ABSMAX, X = torch.zeros(3, 32, dtype=torch.uint8), torch.ones(3, 1), torch.ones(2, 64)
LINEAR = (QWEIGHT, ABSMAX, None)
GOOD = {
    "nf4_quantize": (X, 64),
    "nf4_dequantize": (QWEIGHT, ABSMAX, 64, torch.float32),
    "nf4_dequantize.out": (QWEIGHT, ABSMAX, 64),
    "absmax_quantize": (ABSMAX,),
    "absmax_dequantize": (torch.zeros(5, dtype=torch.uint8), torch.ones(2)),
    "lora_linear": (X, *LINEAR, None, None, None, 1.0, 0.0, None, 64),
    "lora_linear_backward": (torch.ones(2, 3), X, X[:, :0], *LINEAR, None, None, 1.0, 0.0, None, 64, True),
}
BAD = {
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
def test_the_kernel_for_few_rows_checks_in_the_same_words():
    op = torch.ops.nf4lora_cuda.lora_linear_few.default
    for arguments in BAD["lora_linear"]:
        with pytest.raises((TypeError, ValueError)) as on_cpu:
            call("lora_linear", arguments, None)
        with pytest.raises(type(on_cpu.value)) as on_cuda:
            op.redispatch(CUDA, *arguments)
        assert str(on_cuda.value) == str(on_cpu.value)


@pytest.mark.skipif(not _C.CUDA_VERSION, reason="built without CUDA")
def test_which_tensors_the_kernel_for_few_rows_takes():
    from nf4lora import cuda

    class Tensor:
        """What a tensor on a card says of itself."""

        is_cuda = True

        def __init__(self, *shape, dtype=torch.bfloat16, address=1 << 20, contiguous=True):
            self.shape, self.dtype, self._address, self._contiguous = shape, dtype, address, contiguous

        def numel(self):
            return torch.Size(self.shape).numel()

        def data_ptr(self):
            return self._address

        def is_contiguous(self):
            return self._contiguous

    launch = (Path(__file__).parents[1] / "csrc/cuda/launch.h").read_text()
    assert f"kMostFewRows = {cuda.FEW_ROWS};" in launch
    codes = Tensor(8, 32, dtype=torch.uint8)
    assert cuda.fits_few(Tensor(16, 64), codes)
    assert cuda.fits_few(Tensor(2, 8, 64, dtype=torch.float16), codes)
    assert cuda.fits_few(Tensor(64), codes)
    assert cuda.fits_few(Tensor(0, 64), codes)
    assert cuda.fits_few(Tensor(4, 64, address=2, contiguous=False), codes)  # a copy is aligned
    assert not cuda.fits_few(Tensor(17, 64), codes)
    assert not cuda.fits_few(Tensor(4, 64, dtype=torch.float32), codes)
    assert not cuda.fits_few(Tensor(4, 64, address=(1 << 20) + 2), codes)
    assert not cuda.fits_few(Tensor(4, 64), Tensor(8, 32, dtype=torch.uint8, address=8))
    assert not cuda.fits_few(torch.ones(1, 64, dtype=torch.bfloat16), torch.zeros(8, 32, dtype=torch.uint8))
