"""What every test shares: the device it runs on, the CPU's instruction set, a fresh seed."""

import os

import pytest
import torch
from hypothesis import settings

from nf4lora import _C

pytest.register_assert_rewrite("absmax_claims")
settings.register_profile("nf4lora", max_examples=40, deadline=None)  # timings on a busy machine are not what is tested
settings.register_profile("few", max_examples=8, deadline=None)  # for instrumented builds, which are slow
settings.load_profile("nf4lora")

KNOWN_SETS = ["scalar", "avx2", "avx512", "avx512bf16", "amx"]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        if os.environ.get("NF4LORA_REQUIRE_CUDA"):
            pytest.fail("NF4LORA_REQUIRE_CUDA is set, but torch sees no CUDA device")
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session", params=KNOWN_SETS)
def instruction_set(request):
    """Each instruction set in turn, forced; session scope, because hypothesis refuses anything narrower."""
    if request.param not in _C.cpu_instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    _C.force_cpu_instruction_set(request.param)
    yield request.param
    _C.force_cpu_instruction_set("")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
