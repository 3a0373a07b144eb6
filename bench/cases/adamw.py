"""adamw: a step of the optimizer in 32 and in 8 bits, with its state in memory and paged out; the drift over many."""

from __future__ import annotations

import torch

from nf4lora import _C, PagedAdamW, ops
from nf4lora.ops import reference

from ..harness.case import Settings, check_equal, installed, without
from ..harness.machine import peak_bandwidth
from ..harness.table import Table
from ..harness.timing import alternate
from . import drift, paging

QUESTION = "What does a step of AdamW cost in time and in bytes?"
NUMBERS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}


def run(settings: Settings) -> list[Table]:
    count = 1 << 16 if settings.quick else 20_000_000 if settings.device == "cpu" else 100_000_000
    rows = [row(count, dtype, settings) for dtype in (torch.float32, torch.bfloat16)]
    step = Table(
        f"One step of AdamW, {count / 1e6:.3g} M values",
        rows,
        [
            "fused / ours: torch.optim.AdamW(fused=True), moments in the parameter's dtype, over ours",
            "bitsandbytes / ours: its AdamW8bit over our 8 bits",
            "GB/s: of parameter and moments read and written, gradient read; copy_: of what it reads and writes",
            "state: bytes of moments per value",
            *without("bitsandbytes"),
        ],
        [] if settings.quick else card_targets(rows) if settings.device == "cuda" else cpu_targets(rows),
    )
    if settings.device == "cuda":
        return [step, small_tensors(settings), *paging.on_card(count, settings), drift.table(settings)]
    tables = [step, by_instruction_set(count, settings), small_tensors(settings), paging.on_disk(count, settings)]
    return [*tables, drift.table(settings)]


def cpu_targets(rows: list[dict]) -> list[tuple[str, bool]]:
    """The targets on a CPU."""
    targets = []
    for cells in rows:
        for bits, most in ((32, 1.0), (8, 1.2)):
            ratio = 1 / cells[f"{bits} bits, fused / ours"]["median"]
            claim = f"{cells['dtype']}, {bits} bits: at most {most} of the time of torch's fused, got {ratio:.2f}"
            targets.append((claim, ratio <= most))
    most = max(cells["8 bits, state"] for cells in rows)
    return [*targets, (f"8 bits: at most 2.05 bytes of state per value, got {most:.2f}", most <= 2.05)]


def card_targets(rows: list[dict]) -> list[tuple[str, bool]]:
    """The targets on a GPU; none if its bandwidth is not known."""
    peak = peak_bandwidth(torch.cuda.get_device_properties(torch.cuda.current_device()))
    if peak is None:
        return []
    targets = []
    for cells in rows:
        for bits in (32, 8):
            share = cells[f"{bits} bits, GB/s"] * 1e9 / peak
            claim = f"{cells['dtype']}, {bits} bits: at least 85 % of {peak / 1e12:.2f} TB/s, got {share:.1%}"
            targets.append((claim, share >= 0.85))
    return targets


class Contenders:
    """The optimizers that are compared, each with the same parameters and gradients."""

    def __init__(self, count: int, dtype: torch.dtype, device: str) -> None:
        param, grad = torch.randn(count).to(device, dtype), torch.randn(count).to(device, dtype)
        check_step(param, grad)
        skipped = torch.zeros(1, dtype=torch.int64, device=device)
        wide = [torch.zeros(count, device=device) for _ in range(2)]
        narrow = [torch.full((count,), zero, dtype=torch.uint8, device=device) for zero in (127, 0)]
        absmax = torch.zeros(-(-count // 256), 2, device=device)
        trained = torch.nn.Parameter(param.clone())
        trained.grad = grad
        self.state = {"32": 8.0, "8": sum(t.nbytes for t in (*narrow, absmax)) / count}
        self.moved = {
            bits: count * (3 * param.element_size() + 2 * state_bytes) for bits, state_bytes in self.state.items()
        }
        self.calls = {
            "32": lambda: ops.adamw_step_([param], [grad], [wide[0]], [wide[1]], [], skipped, **NUMBERS),
            "8": lambda: ops.adamw_step_([param], [grad], [narrow[0]], [narrow[1]], [absmax], skipped, **NUMBERS),
            "fused": torch.optim.AdamW([trained], lr=1e-3, fused=True).step,
        }
        if device == "cuda":  # on a CPU copy_ runs in one thread
            self.calls["copy"] = lambda: wide[0].copy_(wide[1])
        if installed("bitsandbytes"):
            from bitsandbytes.optim import AdamW8bit

            self.calls["bitsandbytes"] = AdamW8bit([trained], lr=1e-3).step


def row(count: int, dtype: torch.dtype, settings: Settings) -> dict:
    contenders = Contenders(count, dtype, settings.device)
    times = alternate(contenders.calls, seconds=0.1 if settings.quick else 4.0, device=settings.device)
    result: dict = {"dtype": str(dtype).removeprefix("torch."), "fused, ms": times["fused"].spread()}
    for bits, state_bytes in contenders.state.items():
        result |= {
            f"{bits} bits, ms": times[bits].spread(),
            f"{bits} bits, fused / ours": times["fused"].over(times[bits]),
            f"{bits} bits, GB/s": contenders.moved[bits] / times[bits].median / 1e9,
            f"{bits} bits, state": state_bytes,
        }
    if "copy" in times:
        result["copy_, GB/s"] = 8 * count / times["copy"].median / 1e9
    rival = times.get("bitsandbytes")
    return result | {"bitsandbytes / ours": rival.over(times["8"]) if rival else None}


def by_instruction_set(count: int, settings: Settings) -> Table:
    """A step with older instruction sets, except for torch, whose step is bound by memory and would change little."""
    rows = []
    calls = Contenders(count, torch.float32, "cpu").calls
    for name in _C.cpu_instruction_sets():
        _C.force_cpu_instruction_set(name)
        try:
            timed_calls = {bits: calls[bits] for bits in ("32", "8", "fused")}
            times = alternate(timed_calls, seconds=0.1 if settings.quick else 1.0)
        finally:
            _C.force_cpu_instruction_set("")
        cells: dict = {"instruction set": name}
        for bits in ("32", "8"):
            cells[f"{bits} bits, ms"] = times[bits].spread()
            cells[f"{bits} bits, fused / ours"] = times["fused"].over(times[bits])
        rows.append(cells)
    return Table(
        "The same in float32, held to an instruction set",
        rows,
        [
            "fused: torch's, which keeps all that this processor has: it waits for memory",
            "scalar: without fused multiply-add, which libm plays",
        ],
    )


def small_tensors(settings: Settings) -> Table:
    """A step of so few values that only the calls and Python take time."""
    rows = []
    for count in (1, 64, 420):  # 420: two of rank 16 for each linear layer of SmolLM2-135M
        params = [torch.nn.Parameter(torch.randn(64, device=settings.device)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn_like(p)
        paged = PagedAdamW(params, bits=8)
        paged.step()
        calls = {
            "ours": paged.step,
            "op": paging.unpaged(paged),
            "fused": torch.optim.AdamW(params, fused=True).step,
            "foreach": torch.optim.AdamW(params, foreach=True).step,
        }
        times = alternate(calls, seconds=0.05 if settings.quick else 0.5, device=settings.device)
        rows.append(
            {
                "tensors": count,
                "PagedAdamW, ms": times["ours"].spread(),
                "the op alone, ms": times["op"].spread(),
                "fused, ms": times["fused"].spread(),
                "fused / ours": times["fused"].over(times["ours"]),
                "foreach / ours": times["foreach"].over(times["ours"]),
            }
        )
    return Table(
        "A step of tensors of 64 values each",
        rows,
        ["PagedAdamW: 8 bits, all in one call of the op", "fused, foreach: those of torch.optim.AdamW"],
    )


def check_step(param: torch.Tensor, grad: torch.Tensor) -> None:
    """Check a step of the first values against the reference, in 32 and in 8 bits."""
    g, device = grad[:5000], param.device
    zeros, blocks = torch.zeros(5000), torch.zeros(20, 2)
    codes = [torch.full((5000,), zero, dtype=torch.uint8) for zero in (127, 0)]
    for moments in ([zeros, zeros.clone()], [*codes, blocks]):
        want = reference.adamw_step(param[:5000].cpu(), g.cpu(), *(t.clone() for t in moments), **NUMBERS)
        values, state = param[:5000].clone(), [t.to(device, copy=True) for t in moments]
        skipped = torch.zeros(1, dtype=torch.int64, device=device)
        ops.adamw_step_([values], [g], [state[0]], [state[1]], state[2:], skipped, **NUMBERS)
        for name, result, expected in zip(
            ("param", "exp_avg", "exp_avg_sq", "absmax"), (values, *state), want, strict=False
        ):
            check_equal(f"adamw_step_, {name}", result.cpu(), expected)
