"""The arenas of a CPU: how state is laid out and cut, in RAM and in a file that is scratch."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nf4lora import PagedAdamW
from nf4lora.optim.arena import HUGE_PAGE, FileArena, RamArena
from nf4lora.optim.layout import ALIGNMENT, SEGMENT, cut, lay_out

from support.bits import assert_same_bits

SIZES = [(300, 70), (5,), (64, 64), (1,), (41_000,), (0,), (9, 1000)]


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]


def train(params, optimizer, steps=range(3)):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


# ---- layout


def layouts_of(counts, bits):
    return lay_out([(count, -(-count // 256) if bits == 8 else None) for count in counts])


@given(
    st.lists(st.integers(0, 40_000), max_size=12),
    st.sampled_from([8, 32]),
    st.sampled_from([1 << 12, 1 << 15, 1 << 30]),
)
def test_chunks_visit_every_value_once_and_in_order(counts, bits, chunk_bytes):
    layouts, size = layouts_of(counts, bits)
    visited, last = {}, (-1, 0)
    for chunk in cut(layouts, chunk_bytes):
        assert chunk.segments
        held = [(offset, offset + length) for offset, length in chunk.ranges]
        parts = [
            part for segment in chunk.segments for part in layouts[segment.param].ranges(segment.begin, segment.end)
        ]
        for offset, length in parts:
            assert any(start <= offset and offset + length <= end for start, end in held)
        piece_bytes = layouts_of([SEGMENT], bits)[1]
        assert sum(length for _, length in chunk.ranges) <= max(chunk_bytes, piece_bytes)
        for segment in chunk.segments:
            assert segment.begin == visited.get(segment.param, 0)  # the next value of its layout
            assert segment.begin % SEGMENT == 0
            assert (segment.param, segment.begin) >= last
            visited[segment.param], last = segment.end, (segment.param, segment.begin)
    assert visited == dict(enumerate(counts))
    assert all(0 <= offset and offset + length <= size for s in layouts for offset, length in s.ranges(0, s.count))


@given(st.lists(st.integers(0, 5000), max_size=12), st.sampled_from([8, 32]))
def test_tensors_do_not_overlap_and_begin_at_a_cache_line(counts, bits):
    layouts, size = layouts_of(counts, bits)
    parts = [part for layout in layouts for part in layout.ranges(0, layout.count)]
    end = 0
    for offset, length in parts:
        assert offset % ALIGNMENT == 0
        assert offset >= end
        end = offset + length
    assert end <= size <= sum(length + ALIGNMENT for _, length in parts)


@pytest.mark.parametrize("bits", [32, 8])
def test_state_of_all_parameters_is_one_range_in_step_order(bits):
    params = parameters()
    optimizer = PagedAdamW([{"params": params[:3]}, {"params": params[3:]}], bits=bits)
    train(params, optimizer, range(1))
    names = ["exp_avg", "exp_avg_sq", *(["absmax"] if bits == 8 else [])]
    shown = [optimizer.state[p][name] for p in params if p.numel() for name in names]
    addresses = [each.data_ptr() for each in shown]
    assert addresses == sorted(addresses)
    assert addresses[0] % HUGE_PAGE == 0
    assert addresses[-1] + shown[-1].nbytes - addresses[0] <= optimizer.stats()["bytes"]


@pytest.mark.parametrize(("bits", "most"), [(8, 2.05), (32, 8.01)])
def test_bytes_of_state_per_parameter(bits, most):
    params = [nn.Parameter(torch.zeros(1024, 64)) for _ in range(16)]
    optimizer = PagedAdamW(params, bits=bits)
    train(params, optimizer, range(1))
    assert optimizer.stats()["bytes"] / (1 << 20) <= most


# ---- RAM


@pytest.mark.slow
def test_state_goes_with_the_optimizer_and_the_last_of_its_tensors():
    params = parameters()
    optimizer = PagedAdamW(params)
    train(params, optimizer, range(1))
    arena = weakref.ref(next(iter(optimizer._param_states.values())).bucket.arena)
    kept = optimizer.state[params[0]]["exp_avg"]
    memory = weakref.ref(arena().memory)
    del optimizer
    gc.collect()
    assert arena() is None
    assert kept.abs().sum() > 0  # still there, though its arena's owner has gone
    assert memory() is not None
    del kept
    gc.collect()
    assert memory() is None


def test_pages_are_taken_when_they_are_used():
    arena = RamArena(8 << 20)
    assert arena.stats() == {"resident": 0, "paged": 8 << 20, "peak": 0}
    arena.tensor((0, 1 << 20), torch.uint8).fill_(1)
    assert 1 << 20 <= arena.stats()["resident"] <= 4 << 20  # whole huge pages where the system gives them


def test_an_arena_beyond_memory_says_what_helps():
    with pytest.raises(MemoryError, match=r"state must fit into RAM, got \d+ MiB.*page_to=<folder>.*bits=8"):
        RamArena(1 << 46)


# ---- a file


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(FileArena, "chunk_bytes", 64 << 10)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_file_changes_no_bit(tmp_path, small_chunks, bits):
    params, others = parameters(), parameters()
    file, ram = PagedAdamW(params, bits=bits, page_to=tmp_path), PagedAdamW(others, bits=bits)
    for step in range(4):
        train(params, file, [step])
        train(others, ram, [step])
        if step == 1:
            file.evict()
    assert file.stats()["mode"] == "file"
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)
        for name, value in ram.state[q].items():
            assert_same_bits(file.state[p][name], value, name)


@pytest.mark.parametrize("bits", [32, 8])
def test_what_is_in_the_page_cache_is_visited_at_once_and_the_rest_is_asked_for(tmp_path, monkeypatch, bits):
    layouts, size = lay_out([(4 << 20, 4 << 12 if bits == 8 else None)])
    arena = FileArena(size, tmp_path)
    arena.cut_into_chunks(layouts)
    first = arena.chunks[0].segments[0]
    assert 900_000 < first.end - first.begin <= 1 << 20
    chunks, asked = list(range(len(arena.chunks))), []
    monkeypatch.setattr(arena, "_advise", lambda chunk, advice: asked.append(chunk))
    monkeypatch.setattr(arena, "resident", lambda: size)
    assert arena.visits(chunks) == [chunks]
    assert asked == []
    monkeypatch.setattr(arena, "resident", lambda: size - 4096)
    assert arena.visits(chunks) == [[chunk] for chunk in chunks]
    assert asked == chunks[: FileArena.ahead]
    for chunk in chunks:
        arena.acquire([chunk], 0)
    assert asked == chunks


def test_nothing_is_seen_in_the_folder(tmp_path):
    params = parameters()
    optimizer = PagedAdamW(params, page_to=tmp_path)
    train(params, optimizer)
    assert list(tmp_path.iterdir()) == []
    assert optimizer.evict() >= 0
    assert f"{optimizer.stats()['bytes'] / (1 << 20):.1f} MiB of state (file)" in optimizer.report()


SCRIPT = """
import os, sys, time, torch
from nf4lora import PagedAdamW
p = torch.nn.Parameter(torch.zeros(4 << 20))
optimizer = PagedAdamW([p], page_to=sys.argv[1])
p.grad = torch.ones_like(p)
optimizer.step()
print("stepped", flush=True)
{then}
"""


def used(folder):
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.slow
@pytest.mark.parametrize("then", ["pass", "os._exit(1)", "time.sleep(60)"], ids=["end", "exit", "kill"])
def test_the_file_goes_with_its_process_however_that_ends(tmp_path, then):
    command = [sys.executable, "-c", SCRIPT.format(then=then), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "stepped\n"
        deleted = [os.readlink(each) for each in Path(f"/proc/{child.pid}/fd").iterdir() if each.is_symlink()]
        assert then != "time.sleep(60)" or any(f"{tmp_path}/" in each and "deleted" in each for each in deleted)
        if "sleep" in then:
            child.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.alone
def test_a_full_disk_is_told_before_anything_is_trained(tmp_path):
    p = nn.Parameter(torch.zeros(1).expand(1 << 41))  # which says 16 TB of state, and holds four bytes
    before = used(tmp_path)
    with pytest.raises(
        OSError, match=r"page_to must have room for the state, 16777\d+ MiB, got \d+ MiB free in .*bits=8"
    ):
        PagedAdamW([p], page_to=tmp_path)
    gc.collect()
    assert used(tmp_path) - before < 64 << 20


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(FileNotFoundError, match="page_to must be a folder to write to, got .*nowhere"):
        PagedAdamW(parameters(), page_to=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="page_to must be a folder"):
        PagedAdamW(parameters(), page_to=tmp_path / "file")


def on_a_disk(folder):
    kinds = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [each for each in kinds if str(folder).startswith(each[1])]
    return max(inside, key=lambda each: len(each[1]))[2] not in ("tmpfs", "ramfs", "overlay")


def test_evicted_state_is_on_the_disk_and_used_again(tmp_path):
    if not on_a_disk(tmp_path):
        pytest.skip("the temporary folder is in memory")
    p, q = (nn.Parameter(torch.zeros(4 << 20)) for _ in range(2))
    optimizer, ram = PagedAdamW([p], page_to=tmp_path), PagedAdamW([q])
    for _ in range(3):
        p.grad = q.grad = torch.randn(p.shape)
        optimizer.step()
        ram.step()
        before = optimizer.stats()
        assert before["resident"] > 0.9 * before["bytes"]
        assert optimizer.evict() > 0.9 * before["bytes"]
        after = optimizer.stats()
        assert after["resident"] < 0.1 * after["bytes"]
        assert after["paged"] + after["resident"] == after["bytes"]
        assert after["peak"] == before["resident"]
    assert_same_bits(p, q)


@pytest.mark.slow
def test_state_may_exceed_the_memory_that_a_process_may_have(tmp_path):
    code = """
    import resource, sys, torch
    from nf4lora import PagedAdamW
    p = torch.nn.Parameter(torch.zeros(16 << 20))
    p.grad = torch.ones_like(p)
    taken = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (taken + (96 << 20),) * 2)
    try:
        PagedAdamW([p]).step()
    except MemoryError as error:
        print("page_to=<folder>" in str(error))
    optimizer = PagedAdamW([p], page_to=sys.argv[1])  # 128 MB, where 96 may be had
    optimizer.step()
    print(optimizer.stats()["bytes"] >> 20, round(float(p[0].detach()), 4))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.split() == ["True", "128", "-0.001"], result.stderr


@pytest.mark.alone
def test_a_step_in_a_file_is_not_much_slower_than_in_ram(tmp_path):
    params, others = ([nn.Parameter(torch.zeros(1 << 20)) for _ in range(2)] for _ in range(2))
    file, ram = PagedAdamW(params, page_to=tmp_path), PagedAdamW(others)
    seconds = {}
    for _ in range(4):  # the first step takes the pages
        for each, its in ((params, file), (others, ram)):
            for p in each:
                p.grad = torch.ones_like(p)
            start = time.perf_counter()
            its.step()
            seconds[its.page_to] = min(seconds.get(its.page_to, 1e9), time.perf_counter() - start)
    assert seconds[str(tmp_path)] < 5 * seconds[None]  # 1.05 times as long where nobody else works (bench adamw)
