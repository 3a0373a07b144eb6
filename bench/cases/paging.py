"""The cost of keeping an optimizer's state in other memory: tables of the case `adamw`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from nf4lora import PagedAdamW, ops

from ..harness.case import Settings
from ..harness.table import Table
from ..harness.timing import alternate

TENSORS = 64
LORA = 10_000_000


def stepping(count: int, device: str, **options) -> PagedAdamW:
    """An optimizer with the state of `count` values in some tensors, as LoRA has them, after a step."""
    params = [torch.nn.Parameter(torch.randn(count // TENSORS, device=device)) for _ in range(TENSORS)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = PagedAdamW(params, **options)
    optimizer.step()
    return optimizer


def evicted(optimizer: PagedAdamW) -> Callable[[], object]:
    """A step that begins with all state evicted."""

    def step() -> None:
        optimizer.evict()
        optimizer.step()

    return step


def on_card(count: int, settings: Settings) -> list[Table]:
    """Tables for all values at once, and for as many as LoRA trains."""
    lora = 1 << 16 if settings.quick else LORA
    return [whole_arena(count, settings), *([behind_work(lora, settings)] if count >= lora else [])]


def whole_arena(count: int, settings: Settings) -> Table:
    """Steps with all state on the card, with the state evicted before every step, and with streamed state."""
    rows = []
    for bits in (32, 8):
        managed, streamed = (stepping(count, "cuda", bits=bits, paging=mode) for mode in ("managed", "streamed"))
        times = alternate(
            {
                "op": unpaged(managed),
                "managed": managed.step,
                "evicted": evicted(managed),
                "streamed": streamed.step,
            },
            seconds=0.1 if settings.quick else 2.0,
            device="cuda",
        )
        state = managed.stats()["bytes"]
        rows.append(
            {
                "bits": bits,
                "state, MB": state / 1e6,
                "op on plain memory, ms": times["op"].spread(),
                "managed, all fits, ms": times["managed"].spread(),
                "managed / op": times["managed"].over(times["op"]),
                "evicted before, ms": times["evicted"].spread(),
                "streamed, ms": times["streamed"].spread(),
                "streamed, GB/s each way": state / times["streamed"].median / 1e9,
            }
        )
    return Table(
        f"PagedAdamW, a step of {count / 1e6:.3g} M values in {TENSORS} tensors",
        rows,
        [
            "evicted before: evict() and the step that brings everything back",
            "streamed: pinned memory through three buffers of the card; the bound is the bus, both ways at once",
        ],
    )


def behind_work(count: int, settings: Settings) -> Table:
    """Whether copying state back after a step overlaps with the work that follows, such as a forward pass."""
    matrix = torch.randn(
        1 << (9 if settings.quick else 13), 1 << (9 if settings.quick else 13), device="cuda"
    ).bfloat16()

    def work() -> None:
        for _ in range(8):
            torch.mm(matrix, matrix)

    def followed(optimizer: PagedAdamW) -> Callable[[], object]:
        return lambda: (optimizer.step(), work())

    rows = []
    for bits in (32, 8):
        managed, streamed = (stepping(count, "cuda", bits=bits, paging=mode) for mode in ("managed", "streamed"))
        fused = torch.optim.AdamW(managed.param_groups[0]["params"], fused=True)
        fused.step()
        times = alternate(
            {
                "work": work,
                "managed": managed.step,
                "streamed": streamed.step,
                "fused": fused.step,
                "managed, work": followed(managed),
                "streamed, work": followed(streamed),
            },
            seconds=0.1 if settings.quick else 2.0,
            device="cuda",
        )
        rows.append(
            {
                "bits": bits,
                "state, MB": managed.stats()["bytes"] / 1e6,
                "torch's fused, ms": times["fused"].spread(),
                "managed, ms": times["managed"].spread(),
                "streamed, ms": times["streamed"].spread(),
                "work, ms": times["work"].spread(),
                "managed and work, ms": times["managed, work"].spread(),
                "streamed and work, ms": times["streamed, work"].spread(),
                "streamed / managed, with work": times["streamed, work"].over(times["managed, work"]),
            }
        )
    return Table(
        f"PagedAdamW, {count / 1e6:.3g} M values as LoRA has them, {TENSORS} tensors, and the work that follows",
        rows,
        ["work: eight products of bf16 matrices of 8192 x 8192, in the place of the next forward pass"],
    )


def unpaged(optimizer: PagedAdamW) -> Callable[[], object]:
    """The op on the same parameters, with moments in torch's own memory."""
    params = optimizer.param_groups[0]["params"]
    states = [{name: tensor.clone() for name, tensor in optimizer.state[p].items()} for p in params]
    moments = [[state[name] for state in states if name in state] for name in ("exp_avg", "exp_avg_sq", "absmax")]
    lists = [[p.detach() for p in params], [p.grad for p in params], *moments]
    skipped = torch.zeros(1, dtype=torch.int64, device=params[0].device)
    return lambda: ops.adamw_step_(*lists, skipped)


def on_disk(count: int, settings: Settings) -> Table:
    """Steps with state in RAM, in a file in the page cache, and in a file on disk that each step reads and writes."""
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for bits in (32, 8):
            ram, file = stepping(count, "cpu", bits=bits), stepping(count, "cpu", bits=bits, page_to=folder)
            state = file.stats()["bytes"]
            yardstick = Path(folder) / "yardstick"
            times = alternate(
                {
                    "ram": ram.step,
                    "file": file.step,
                    "disk": evicted(file),
                    "plain": lambda path=yardstick, size=state: write_and_read(path, size),
                },
                seconds=0.1 if settings.quick else 6.0,
                device="cpu",
            )
            yardstick.unlink()
            rows.append(
                {
                    "bits": bits,
                    "state, MB": state / 1e6,
                    "RAM, ms": times["ram"].spread(),
                    "file in the page cache, ms": times["file"].spread(),
                    "file / RAM": times["file"].over(times["ram"]),
                    "from the disk and back, ms": times["disk"].spread(),
                    "plain write and read, ms": times["plain"].spread(),
                    "plain / ours": times["plain"].over(times["disk"]),
                }
            )
    return Table(
        f"PagedAdamW(page_to=folder), a step of {count / 1e6:.3g} M values in {TENSORS} tensors",
        rows,
        [
            "from the disk and back: evict(), which writes all state to the disk, and the step that reads it again",
            "plain write and read: as many bytes to a file of the same folder with write() and fsync(), out of the "
            "page cache, and back with read()",
        ],
        [] if settings.quick else [of_disk(row) for row in rows],
    )


def of_disk(row: dict) -> tuple[str, bool]:
    """The target that the state is read and written at the disk's speed."""
    ratio = row["plain / ours"]["median"]
    return f"{row['bits']} bits: at least the speed of plain write and read, got {ratio:.2f}", ratio >= 1.0


def write_and_read(path: Path, size: int) -> None:
    """Write `size` bytes to the disk and read them back, as a measure of the disk's own speed."""
    block = bytearray(8 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size, len(block)):
            file.write(block)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
