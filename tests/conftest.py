"""What every test shares: the device it runs on, the CPU's instruction set, a fresh seed, the machine itself."""

import contextlib
import fcntl
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from nf4lora import _C

pytest.register_assert_rewrite("support")
settings.register_profile("nf4lora", max_examples=40, deadline=None)  # timings on a busy machine are not what is tested
settings.register_profile("few", max_examples=8, deadline=None)  # for instrumented builds, which are slow
settings.load_profile("nf4lora")

# A shell lets what it starts in the background (`make test &`) ignore Ctrl-C; the runs that tests interrupt must not.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

KNOWN_SETS = ["scalar", "avx2", "avx512", "avx512bf16", "amx", "neon"]


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests run beside others in several processes (`pytest -n`), but for those that need the machine or its GPU."""
    alone = item.get_closest_marker("alone") is not None
    on_gpu = item.get_closest_marker("gpu") is not None and torch.cuda.is_available()
    with machine(alone), locked("support/ptx/__init__.py") if on_gpu else contextlib.nullcontext():
        return (yield)


@contextlib.contextmanager
def machine(alone):
    """A place among the tests that are running; or all of it, when those have ended."""
    with contextlib.ExitStack() as door, contextlib.ExitStack() as room:
        # Who waits to be alone stands in the door, or the others would never all be out.
        door.enter_context(locked("support/models.py"))
        room.enter_context(locked("conftest.py", shared=not alone))
        if not alone:
            door.close()
        yield


@contextlib.contextmanager
def locked(name, shared=False):
    """A lock among all processes that test this checkout; the file is only its name."""
    with (Path(__file__).parent / name).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def card():
    """Questions to a process that sees the card that computes nothing (bench/harness/card)."""
    from bench.harness.card import Card, reason

    if (why := reason()) is not None:
        pytest.skip(why)
    with Card() as questions:
        yield questions
