"""The arenas of a CPU at their limits: what they take and give back, and what a process may not do.

Layout, results and crashes: test_paged.py.
"""

import gc
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from nf4lora import PagedAdamW
from nf4lora.optim.arena import RamArena

from support.bits import assert_same_bits

BITS = pytest.mark.parametrize("bits", [32, 8])
MIB = 1 << 20


def stepped(count, **options):
    p = nn.Parameter(torch.zeros(count))
    optimizer = PagedAdamW([p], **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return p, optimizer


def run(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# ---- what is told


@pytest.mark.parametrize(("bits", "size"), [(32, 8 * MIB), (8, 2 * MIB + 8 * MIB // 256)])
def test_figures_of_an_arena_in_ram(bits, size):
    optimizer = PagedAdamW([nn.Parameter(torch.zeros(MIB))], bits=bits)
    assert optimizer.stats() == {"mode": "none", "bytes": 0, "resident": 0, "paged": 0, "peak": 0, "skipped": 0}
    _, optimizer = stepped(MIB, bits=bits)
    expected = {"mode": "ram", "bytes": size, "resident": size, "paged": 0, "peak": size, "skipped": 0}
    assert optimizer.stats() == expected
    assert size <= 2.05 * MIB or bits == 32
    assert optimizer.evict() == 0
    assert optimizer.stats() == expected
    mebibytes = f"{size / MIB:.1f} MiB"
    assert optimizer.report() == (
        f"PagedAdamW, {bits} bits: {mebibytes} of state (ram), {mebibytes} resident, 0.0 MiB paged, peak {mebibytes}; "
        "0 gradients skipped"
    )


@BITS
def test_figures_of_two_files_add_up(bits, tmp_path):
    p = nn.Parameter(torch.zeros(MIB))
    optimizer = PagedAdamW([p], bits=bits, page_to=tmp_path)
    before = optimizer.stats()
    assert before["mode"] == "file"
    assert before["bytes"] > 0
    assert before["resident"] + before["paged"] == before["bytes"]
    joined = nn.Parameter(torch.zeros(MIB))
    optimizer.add_param_group({"params": [joined]})
    p.grad = joined.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    after = optimizer.stats()
    assert (after["mode"], after["bytes"]) == ("file", 2 * before["bytes"])
    assert after["resident"] == after["peak"] == after["bytes"]
    assert after["skipped"] == 2 * MIB
    found = re.fullmatch(
        r".*: (\S+) MiB of state \(file\), (\S+) MiB resident.*; 2097152 gradients.*", optimizer.report()
    )
    assert found
    assert found[1] == found[2] == f"{after['bytes'] / MIB:.1f}"


# ---- what is given back


def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def test_memory_is_given_back_with_the_optimizer():
    gc.collect()
    p, before = nn.Parameter(torch.zeros(8 * MIB)), anonymous()
    p.grad = torch.ones_like(p)
    optimizer = PagedAdamW([p])
    idle = anonymous()
    optimizer.step()
    assert anonymous() - idle > 60 * MIB  # of 64, others may give some back
    del optimizer
    gc.collect()
    assert anonymous() - idle < 8 * MIB
    assert idle - before < 40 * MIB  # the gradient: the state was not there yet


def held_in(folder):
    """Descriptors and mappings of this process in a folder."""
    links = []
    for each in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(each))
        except OSError:  # the one that listed them
            continue
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [each for each in links + maps if f"{folder}/" in each]


def test_a_file_is_closed_with_the_optimizer_and_the_last_of_its_tensors(tmp_path):
    p, optimizer = stepped(MIB, page_to=tmp_path)
    kept = optimizer.state[p]["exp_avg"]
    assert held_in(tmp_path)
    del optimizer
    gc.collect()
    assert_same_bits(kept, torch.full((MIB,), 0.1))
    del kept
    gc.collect()
    assert held_in(tmp_path) == []


# ---- what is refused


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_told_before_training(tmp_path):
    said = run(
        """
        import resource, sys, torch
        from nf4lora import PagedAdamW
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            PagedAdamW([torch.nn.Parameter(torch.zeros(1 << 20))], page_to=sys.argv[1])
        except OSError as error:
            print(error)
        """,
        tmp_path,
    )
    assert re.search(r"page_to must have room for the state, \d+ MiB, .*File too large; bits=8 makes it", said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_that_may_not_be_written_to_is_told(tmp_path):
    tmp_path.chmod(0o555)
    said = run(
        """
        import os, sys, torch
        from nf4lora import PagedAdamW
        if os.getuid() == 0:  # who may write anywhere
            os.setuid(65534)
        try:
            PagedAdamW([torch.nn.Parameter(torch.zeros(8))], page_to=sys.argv[1])
        except PermissionError as error:
            print(error)
        """,
        tmp_path,
    )
    assert said.endswith(f"PagedAdamW: page_to must be a folder to write to, got {tmp_path}: Permission denied")


# ---- the order of a visit


class Watched(RamArena):
    """An arena that writes down what is asked of it."""

    def __init__(self, size):
        super().__init__(size)
        self.log = []

    def acquire(self, chunks, following):
        self.log.append(("acquire", tuple(chunks), following))

    def release(self, chunks):
        self.log.append(("release", tuple(chunks)))


@BITS
def test_chunks_are_visited_in_turn_where_something_has_a_gradient(monkeypatch, bits):
    made = []

    def arena_of(device, size, page_to, paging):
        made.append(Watched(size))
        return made[-1]

    monkeypatch.setattr("nf4lora.optim.paged_adamw.arena_of", arena_of)
    monkeypatch.setattr(Watched, "chunk_bytes", 96 << 10 if bits == 32 else 24 << 10)
    params = [nn.Parameter(torch.zeros(count)) for count in (8192, 100_000, 300, 8192)]
    optimizer = PagedAdamW(params, bits=bits)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    (arena,) = made
    count = len(arena.chunks)
    assert count > 8
    wanted = [[("acquire", (i,), (i + 1) % count), ("release", (i,))] for i in range(count)]
    assert arena.log == [each for pair in wanted for each in pair]

    arena.log.clear()
    params[1].grad = None
    optimizer.step()
    visited = [each[1][0] for each in arena.log if each[0] == "acquire"]
    of_others = [i for i, chunk in enumerate(arena.chunks) if {segment.param for segment in chunk.segments} != {1}]
    assert visited == of_others
    assert len(visited) < count
    assert [each[2] for each in arena.log if each[0] == "acquire"] == of_others[1:] + of_others[:1]
