"""What steps of changing length leave in the C heap is returned to the system, seldom enough to cost little."""

import copy
import ctypes
import pickle
import platform

import pytest
import torch
from torch import nn

from nf4lora.memory import heap

MB = 1 << 20


@pytest.fixture
def fake(monkeypatch):
    """A process in simulated time: its size, what it falls to when memory is returned, and when that was asked for."""

    class Fake:
        now, size, floor, trims, trim_seconds = 1000.0, 1000 * MB, 500 * MB, (), 0.05

        def trim(self):
            self.trims += (self.now,)
            self.size = self.floor
            return self.trim_seconds

        def step(self, model, seconds=1.0, grows=100 * MB):
            model(torch.zeros(1, 2))
            self.now += seconds
            self.size += grows

    process = Fake()
    monkeypatch.setattr(heap, "_next", 0.0)
    monkeypatch.setattr(heap, "_smallest", 0.0)
    monkeypatch.setattr(heap, "trim", process.trim)
    monkeypatch.setattr(heap, "resident", lambda: process.size)
    monkeypatch.setattr(heap, "seconds_per_byte", lambda: 0.1 / (500 * MB))
    monkeypatch.setattr(heap.time, "monotonic", lambda: process.now)
    return process


@pytest.fixture
def model():
    made = nn.Linear(2, 2)
    heap.keep_small(made)
    heap.keep_small(made)  # once is enough
    assert len(made._forward_pre_hooks) == 1
    return made


def test_memory_is_returned_as_rarely_as_its_cost_asks_for(fake, model):
    for _ in range(100):
        fake.step(model)
    between = [later - earlier for earlier, later in zip(fake.trims, fake.trims[1:])]
    # The first call returns 500 MB: 0.05 s, and 0.1 s to touch them again, at 2 % of the time is 7.5 s.
    assert between[0] == 8.0
    assert all(
        (fake.trim_seconds + 0.1) / seconds <= 0.1 and seconds >= fake.trim_seconds / heap.SHARE for seconds in between
    )
    assert len(fake.trims) > 5


def test_a_process_that_does_not_grow_is_left_alone(fake, model):
    for _ in range(50):
        fake.step(model, grows=0)
    assert len(fake.trims) == 1  # the first one, which finds the smallest size


@pytest.mark.parametrize("how", ["eval", "no_grad", "disabled"])
def test_only_training_steps_return_memory(fake, model, how, monkeypatch):
    if how == "eval":
        model.eval()
    monkeypatch.setattr(heap, "enabled", how != "disabled")
    with torch.set_grad_enabled(how != "no_grad"):
        fake.step(model)
    assert fake.trims == ()


def test_a_compiled_model_is_not_broken(fake, model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1, 2)).shape == (1, 2)


def test_a_model_can_still_be_copied_and_pickled(model):
    assert len(copy.deepcopy(model)._forward_pre_hooks) == 1
    assert len(pickle.loads(pickle.dumps(model))._forward_pre_hooks) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_holes_of_the_heap_go_back_to_the_system():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size = 64 << 10  # below any threshold from which malloc maps a block of its own
    blocks = [libc.malloc(size) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    full = heap.resident()
    for block in blocks[: len(blocks) - 1]:  # the last one keeps the heap's top where it is
        libc.free(block)
    before = heap.seconds
    assert heap.trim() > 0
    assert heap.seconds > before
    assert full - heap.resident() > 100 * MB
    libc.free(blocks[-1])


def test_touching_fresh_memory_takes_time():
    assert 1e-12 < heap.seconds_per_byte() < 1e-6
    assert heap.seconds_per_byte() == heap.seconds_per_byte()


def test_a_system_that_says_nothing_of_its_memory_is_no_error(monkeypatch):
    def nothing(*_):
        raise OSError

    monkeypatch.setattr("builtins.open", nothing)
    assert heap.resident() == 0
