"""The pager of csrc/cuda/paged.cpp on a fake device: what it asks of CUDA, in which order, and what survives errors."""

import random

import pytest
import torch

from support import cudart
from support.bits import assert_same_bits

MB = 1 << 20
OUT_OF_MEMORY, LOST, REFUSED = 2, 719, 801
PAGE = 4096


@pytest.fixture(params=cudart.VERSIONS)
def fake(request):
    """The fake device, and afterwards: nothing left over, nothing that a real one would have refused."""
    module = cudart.load(request.param)
    module.reset()
    yield module
    module.finish()
    assert module.wrongs() == []
    assert module.alive() == {"blocks": 0, "streams": 0, "events": 0}


CHUNKS = {
    1: [[(0, 3 * PAGE)]],
    2: [[(0, 2 * PAGE)], [(2 * PAGE, 5 * PAGE)]],
    4: [[(0, 1000)], [(1024, 8000), (10240, 8000), (20480, 256)], [(12 * PAGE, PAGE)], [(14 * PAGE, 100)]],
    7: [[(i * 2 * PAGE, PAGE + 512)] for i in range(7)],
}
BYTES = 16 * PAGE


class Arena:
    """A pager and what its bytes should be."""

    def __init__(self, fake, mode, chunks, size=BYTES):
        self.fake, self.chunks = fake, chunks
        self.pager = fake.Pager(0, size, mode)
        self.pager.plan(chunks)
        self.bytes = torch.frombuffer(self.pager, dtype=torch.uint8)
        self.bytes.copy_(torch.arange(size) % 251)
        self.expected = self.bytes.clone()
        self.stream = fake.new_stream()

    def update(self, chunk, following, release=True):
        self.pager.acquire([chunk], following, self.stream)
        places = self.pager.addresses(chunk)
        self.fake.kernel(self.stream, [(at, size) for at, (_, size) in zip(places, self.chunks[chunk], strict=True)])
        for offset, size in self.chunks[chunk]:
            part = self.expected[offset : offset + size]
            part.copy_(3 * part + 1)
        if release:
            self.pager.release([chunk], self.stream)

    def step(self, order=None):
        order = list(range(len(self.chunks))) if order is None else order
        self.pager.begin()
        for chunk, following in zip(order, order[1:] + order[:1]):
            self.update(chunk, following)

    def assert_right(self):
        self.pager.wait()
        if self.pager.mode == "managed":
            self.fake.finish()  # the device's own stream order; the host asks for it
        assert_same_bits(self.bytes, self.expected)


MODES = ["managed", "streamed"]


# ---- what arrives


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_any_order_that_the_streams_allow_gives_the_same_bytes(fake, mode, chunks):
    for seed in range(12):
        fake.reset(deferred=True, seed=seed)
        arena = Arena(fake, mode, chunks)
        for _ in range(4):
            arena.step()
        arena.assert_right()
        assert fake.faults() == 0  # a kernel that did not wait for its chunk would have had to fetch it
        del arena
        assert fake.wrongs() == []


@pytest.mark.parametrize("mode", MODES)
def test_chunks_may_be_left_out_of_a_step(fake, mode):
    for seed in range(30):
        fake.reset(deferred=True, seed=seed)
        arena = Arena(fake, mode, CHUNKS[7])
        for _ in range(5):
            arena.step(sorted(random.Random(seed).sample(range(7), random.Random(seed).randint(1, 7))))
        arena.assert_right()
        del arena


@pytest.mark.parametrize("mode", MODES)
def test_what_the_host_writes_between_steps_is_used(fake, mode):
    for seed in range(8):
        fake.reset(deferred=True, seed=seed)
        arena = Arena(fake, mode, CHUNKS[4])
        arena.step()
        arena.assert_right()
        arena.bytes.fill_(7)
        arena.expected.fill_(7)
        arena.step()
        arena.assert_right()
        del arena


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_broke_off_loses_nothing(fake, mode):
    for seed in range(8):
        fake.reset(deferred=True, seed=seed)
        arena = Arena(fake, mode, CHUNKS[7])
        arena.step()
        arena.update(1, 2, release=False)
        arena.step([0, 4])  # of which 4 takes the place of 1
        arena.step()
        arena.assert_right()
        del arena


@pytest.mark.parametrize("mode", MODES)
def test_a_step_never_waits_on_the_host(fake, mode):
    arena = Arena(fake, mode, CHUNKS[7])
    fake.calls()
    arena.step()
    arena.step()
    assert not [call for call in fake.calls() if "Synchronize" in call]


@pytest.mark.parametrize("mode", MODES)
def test_memory_begins_at_a_huge_page_and_is_readable(fake, mode):
    arena = Arena(fake, mode, CHUNKS[1])
    assert arena.pager.address % (2 * MB) == 0 == arena.bytes.data_ptr() - arena.pager.address
    assert len(arena.bytes) == BYTES


@pytest.mark.parametrize("mode", MODES)
def test_tensors_keep_the_memory_and_its_last_one_frees_it(fake, mode):
    arena = Arena(fake, mode, CHUNKS[1])
    kept = arena.bytes
    del arena.pager
    assert fake.alive()["blocks"]
    assert kept[5] == 5
    del arena, kept
    assert fake.alive() == {"blocks": 0, "streams": 0, "events": 0}


@pytest.mark.parametrize("mode", MODES)
def test_memory_goes_only_when_the_work_on_it_is_done(fake, mode):
    fake.reset(deferred=True)
    arena = Arena(fake, mode, CHUNKS[7])
    arena.step()
    del arena  # the fixture asks whether anything ran on memory that was gone
    fake.finish()


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_arena(fake, mode):
    pager = fake.Pager(0, 0, mode)
    pager.plan([])
    pager.wait()
    assert pager.evict() == 0
    del pager


# ---- managed


def prefetches(fake):
    return [call for call in fake.calls() if call.startswith("cudaMemPrefetchAsync")]


def test_the_next_chunk_is_prefetched_before_the_present_one_is_released(fake):
    arena = Arena(fake, "managed", CHUNKS[2])
    start = (arena.pager.address - arena.pager.address // PAGE * PAGE) % PAGE
    assert start == 0
    assert [call for call in fake.calls() if "cudaMemAdvise" in call and ", prefer device 0" in call]
    arena.pager.begin()
    arena.pager.acquire([0], 1, arena.stream)
    found = prefetches(fake)
    assert [call.split(", ")[1:3] for call in found] == [[str(2 * PAGE), "device 0"], [str(5 * PAGE), "device 0"]]
    streams = {call.split(", ")[3] for call in found}
    assert len(streams) == 1
    assert "stream 0)" not in streams
    arena.pager.release([0], arena.stream)
    arena.pager.acquire([1], 0, arena.stream)
    assert prefetches(fake) == []  # it was on its way; the first of the next step is left to that step
    arena.pager.release([1], arena.stream)


def test_prefetches_stay_below_what_is_free(fake):
    chunks = [[(2 * i * MB, 2 * MB)] for i in range(7)]
    arena = Arena(fake, "managed", chunks, 14 * MB)
    fake.set_others((1 << 30) - 5 * MB)  # two chunks, not three
    arena.step()
    arena.assert_right()
    assert arena.pager.residency() == {"resident": 4 * MB, "peak": 4 * MB, "held_back": 5}
    assert fake.faults() > 0  # the kernels brought the rest
    arena.step()
    arena.assert_right()


def test_what_was_pressed_out_is_prefetched_when_there_is_room_again(fake):
    chunks = [[(2 * i * MB, 2 * MB)] for i in range(7)]
    arena = Arena(fake, "managed", chunks, 14 * MB)
    arena.step()
    assert arena.pager.residency()["resident"] == 14 * MB
    fake.set_others((1 << 30) - 5 * MB)  # so that 9 MB of it give way
    for held_back in (7, 14):
        arena.step()
        assert arena.pager.residency() == {"resident": 0, "peak": 14 * MB, "held_back": held_back}
    fake.set_others(0)
    faults = fake.faults()
    fake.calls()
    arena.step()
    assert len(prefetches(fake)) == 7
    assert fake.faults() == faults
    assert arena.pager.residency()["resident"] == 14 * MB
    arena.assert_right()


def test_what_is_here_is_not_prefetched_again(fake):
    arena = Arena(fake, "managed", CHUNKS[7])
    assert not arena.pager.begin()
    arena.step()
    fake.calls()
    assert arena.pager.begin()
    arena.pager.acquire(list(range(7)), 0, arena.stream)
    arena.pager.release(list(range(7)), arena.stream)
    assert [call for call in fake.calls() if not call.startswith("cudaEventRecord")] == ["cudaMemGetInfo()"]


def test_evicted_state_leaves_the_device_and_comes_back(fake):
    for deferred in (False, True):
        fake.reset(deferred=deferred)
        arena = Arena(fake, "managed", CHUNKS[4])
        arena.step()
        before = arena.pager.residency()["resident"]
        assert before == sum(size for ranges in CHUNKS[4] for _, size in ranges)
        assert arena.pager.evict() == before
        assert fake.resident(arena.pager.address, BYTES) == 0  # at once: the caller needs the room now
        assert_same_bits(arena.bytes, arena.expected)
        assert arena.pager.residency() == {"resident": 0, "peak": before, "held_back": 0}
        assert arena.pager.evict() == 0
        arena.step()
        arena.assert_right()
        assert arena.pager.residency()["resident"] == before
        del arena


def test_state_that_the_driver_took_unseen_comes_back_by_faults(fake):
    arena = Arena(fake, "managed", CHUNKS[7])
    arena.step()
    fake.set_others(1 << 30)  # as an allocation of someone else makes pages give way between two steps
    assert fake.resident(arena.pager.address, BYTES) == 0
    fake.set_others(0)
    arena.step()
    faults = fake.faults()
    assert faults > 0
    arena.step()
    assert fake.faults() == faults
    arena.assert_right()


def test_a_refused_prefetch_costs_speed_alone(fake):
    arena = Arena(fake, "managed", CHUNKS[2])
    fake.fail("cudaMemPrefetchAsync", 1, REFUSED)
    arena.step()
    arena.step()
    arena.assert_right()
    assert arena.pager.residency()["held_back"] == 1
    assert fake.faults() > 0


# ---- streamed


def copies(fake):
    return [call for call in fake.calls() if call.startswith("cudaMemcpyAsync")]


def to_device(found):
    return [call for call in found if call.startswith("cudaMemcpyAsync(d")]


def test_buffers_are_three_at_most_and_fit_the_largest_chunk(fake):
    for number, chunks in CHUNKS.items():
        fake.calls()
        arena = Arena(fake, "streamed", chunks)
        sizes = [int(call[len("cudaMalloc(") : -1]) for call in fake.calls() if call.startswith("cudaMalloc(")]
        most = max(sum(-(-size // 256) * 256 for _, size in ranges) for ranges in chunks)
        assert sizes == [most] * min(3, number)
        del arena


def test_the_next_chunk_is_copied_in_while_the_present_one_is_updated(fake):
    arena = Arena(fake, "streamed", CHUNKS[7])
    fake.calls()
    arena.pager.acquire([0], 1, arena.stream)
    found = copies(fake)
    assert len(to_device(found)) == len(found) == 2
    arena.pager.release([0], arena.stream)
    out = copies(fake)
    assert len(out) == 1
    assert not to_device(out)
    streams = {call.split(", ")[-1] for call in found}, {call.split(", ")[-1] for call in out}
    assert len(streams[0] | streams[1]) == 2  # in and out run side by side


def test_state_that_fits_the_buffers_is_copied_in_once(fake):
    arena = Arena(fake, "streamed", CHUNKS[2])
    fake.calls()
    arena.step()
    assert len(to_device(copies(fake))) == 2
    for _ in range(3):
        assert arena.pager.begin()
        arena.step()
    assert to_device(copies(fake)) == []
    arena.assert_right()


def test_the_first_chunk_of_the_next_step_comes_behind_the_last_of_this_one(fake):
    arena = Arena(
        fake, "streamed", CHUNKS[7] + [[(15 * PAGE, 64)]]
    )  # 8 chunks: the first and the last differ in buffer
    arena.step()
    fake.calls()
    arena.pager.acquire([0], 1, arena.stream)
    assert len(to_device(copies(fake))) == 1  # of chunk 1 alone
    arena.pager.release([0], arena.stream)


def test_resident_are_the_chunks_in_the_buffers(fake):
    arena = Arena(fake, "streamed", CHUNKS[7])
    assert arena.pager.residency() == {"resident": 0, "peak": 0, "held_back": 0}
    arena.step()
    assert arena.pager.residency() == {"resident": 3 * (PAGE + 512), "peak": 3 * (PAGE + 512), "held_back": 0}
    assert arena.pager.evict() == 0
    assert arena.pager.residency()["resident"] == 0
    assert_same_bits(arena.bytes, arena.expected)


# ---- the choice


def test_unified_memory_is_the_first_choice(fake):
    pager = fake.Pager(0, BYTES, "auto")
    assert (pager.mode, pager.reason) == ("managed", "")
    del pager


def test_a_device_that_cannot_fault_gets_the_streamed_arena(fake):
    fake.reset(faults=False)
    pager = fake.Pager(0, BYTES, "auto")
    assert pager.mode == "streamed"
    assert "concurrentManagedAccess is 0" in pager.reason
    with pytest.raises(ValueError, match="PagedAdamW: paging must be streamed here"):
        fake.Pager(0, BYTES, "managed")
    del pager


def test_state_larger_than_free_memory_is_streamed(fake):
    fake.reset(total=64 * MB, others=60 * MB)
    pager = fake.Pager(0, 5 * MB, "auto")
    assert pager.mode == "streamed"
    assert pager.reason == "streamed: the state takes 5 MiB, of which the device has 4 MiB free"
    del pager
    pager = fake.Pager(0, 3 * MB, "auto")
    assert pager.mode == "managed"
    del pager


def test_where_unified_memory_is_refused_the_arena_is_streamed(fake):
    fake.fail("cudaMallocManaged", 1, OUT_OF_MEMORY)
    pager = fake.Pager(0, BYTES, "auto")
    assert pager.mode == "streamed"
    assert "cudaMallocManaged must succeed, got: out of memory" in pager.reason
    del pager


# ---- errors


@pytest.mark.parametrize(
    ("mode", "function", "nth"),
    [
        ("managed", "cudaMallocManaged", 1),
        ("managed", "cudaMemAdvise", 1),
        ("managed", "cudaStreamCreateWithFlags", 1),
        ("managed", "cudaEventCreateWithFlags", 2),
        ("managed", "cudaMemGetInfo", 1),
        ("managed", "cudaStreamWaitEvent", 1),
        ("managed", "cudaEventRecord", 2),
        ("streamed", "cudaHostAlloc", 1),
        ("streamed", "cudaMalloc", 1),
        ("streamed", "cudaMalloc", 3),
        ("streamed", "cudaStreamCreateWithFlags", 2),
        ("streamed", "cudaEventCreateWithFlags", 5),
        ("streamed", "cudaMemcpyAsync", 1),
        ("streamed", "cudaMemcpyAsync", 3),
        ("streamed", "cudaStreamWaitEvent", 4),
        ("streamed", "cudaEventRecord", 3),
    ],
)
@pytest.mark.parametrize("code", [OUT_OF_MEMORY, LOST])
def test_every_error_is_told_and_leaks_nothing(fake, mode, function, nth, code):
    fake.fail(function, nth, code)
    text = {OUT_OF_MEMORY: "out of memory", LOST: "unspecified launch failure"}[code]
    arena = None
    with pytest.raises(RuntimeError, match=f"^PagedAdamW: {function}.* must succeed, got: {text}$"):
        for _ in range(2):
            arena = arena or Arena(fake, mode, CHUNKS[7])
            arena.step()
    alive_at_error = fake.alive()
    del arena
    if code == LOST:  # then nothing can be given back, nor must it be
        assert alive_at_error["blocks"] <= 4
        fake.reset()


def test_a_lost_device_does_not_hang_or_crash_what_is_left(fake):
    arena = Arena(fake, "managed", CHUNKS[2])
    arena.step()
    fake.fail("cudaEventRecord", 1, LOST)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        arena.step()
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        arena.pager.evict()
    del arena
    fake.reset()


def test_a_step_can_be_taken_again_after_a_copy_failed(fake):
    arena = Arena(fake, "streamed", CHUNKS[7])
    fake.fail("cudaMemcpyAsync", 1, OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match="out of memory"):
        arena.pager.acquire([0], 1, arena.stream)
    arena.step()
    arena.assert_right()


def test_a_device_that_is_not_there(fake):
    with pytest.raises(RuntimeError, match="cudaSetDevice must succeed, got: invalid device ordinal"):
        fake.Pager(3, BYTES, "auto")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        fake.Pager(3, BYTES, "streamed")
