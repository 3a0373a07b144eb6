"""nf4: the speed of packing and unpacking a weight, and the error of the round trip."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nf4lora import ops
from nf4lora.ops import reference

from ..harness.case import Settings, check_equal, installed, without
from ..harness.shapes import QUICK, SHAPES, Shape
from ..harness.table import Table
from ..harness.timing import Spread, alternate, rotation

QUESTION = "How fast is a weight packed and unpacked, and how much is lost?"

# bitsandbytes, tests/test_functional.py::test_4bit_quant: mean absolute and mean relative error of the round trip of
# N(0, 1), 1024 x 1024, over 200 samples.
PUBLISHED = {
    32: (0.067746, 0.189726),
    64: (0.072798, 0.203339),
    128: (0.076831, 0.215237),
    256: (0.080337, 0.226105),
    512: (0.083547, 0.236079),
    1024: (0.086610, 0.245370),
    2048: (0.089592, 0.254163),
    4096: (0.092547, 0.262473),
}


def run(settings: Settings) -> list[Table]:
    return [speed(settings), round_trip(samples=1 if settings.quick else 20)]


def speed(settings: Settings) -> Table:
    shapes = QUICK if settings.quick else SHAPES
    rows = [speed_of(shape, settings) for shape in shapes]
    targets = []
    if settings.device == "cpu" and not settings.quick:  # of the largest layer
        rate, share = (
            max(zip(shapes, rows, strict=True), key=lambda pair: pair[0].weights)[1][key]
            for key in ("Gweights/s, both", "of fill_")
        )
        targets = [
            (f"at least 5 G weights/s packed with double quantisation, got {rate:.1f}", rate >= 5),
            (f"unpacked into a tensor at 80 % of fill_'s speed at least, got {100 * share:.0f} %", share >= 0.8),
        ]
    return Table(
        "Packing bf16 to NF4 and back, blocksize 64",
        rows,
        [
            "bitsandbytes / ours: its time over ours, each into a new tensor",
            "'unpack, ms' is into an existing tensor; 'of fill_' and 'of copy_' say how close that comes to torch "
            "filling and copying a bf16 tensor of that shape",
            "'both': packed, and its scales quantised again",
            *without("bitsandbytes"),
        ],
        targets,
    )


def speed_of(shape: Shape, settings: Settings) -> dict:
    device, limit = settings.device, 0.1 if settings.quick else 1.0
    weight = torch.randn(shape.N, shape.K, device=device).mul_(0.02).bfloat16()
    qweight, absmax = ops.nf4_quantize(weight)
    same = check_packing(weight, qweight, absmax)
    weights = rotation(lambda _: weight.clone(), weight.nbytes, device)
    packed = rotation(lambda _: (qweight.clone(), absmax.clone()), qweight.nbytes + absmax.nbytes, device)
    outs = rotation(lambda _: torch.empty_like(weight), weight.nbytes, device)

    encoders: dict[str, Callable] = {
        "nf4lora": lambda: ops.nf4_quantize(next(weights)),
        "both": lambda: ops.absmax_quantize(ops.nf4_quantize(next(weights))[1]),
    }
    decoders: dict[str, Callable] = {
        "nf4lora": lambda: ops.nf4_dequantize(*next(packed), out=next(outs)),
        "nf4lora, new": lambda: ops.nf4_dequantize(*next(packed)),
        "fill_": lambda: next(outs).fill_(1),
        "copy_": lambda: next(outs).copy_(next(weights)),
    }
    if installed("bitsandbytes"):
        from bitsandbytes import functional as bnb

        _, state = bnb.quantize_4bit(weight, quant_type="nf4")

        def decode_by_bitsandbytes() -> None:
            codes, scales = next(packed)
            state.absmax = scales.flatten()
            bnb.dequantize_4bit(codes.view(-1, 1), state)

        encoders["bitsandbytes"] = lambda: bnb.quantize_4bit(next(weights), quant_type="nf4")
        decoders["bitsandbytes"] = decode_by_bitsandbytes
    encode = alternate(encoders, seconds=limit, device=device)
    decode = alternate(decoders, seconds=limit, device=device)

    def times(timings: dict, ours: str = "nf4lora") -> Spread | None:
        return timings["bitsandbytes"].over(timings[ours]) if "bitsandbytes" in timings else None

    return {
        "layer": shape.name,
        "same bytes as bitsandbytes": same,
        "pack, ms": encode["nf4lora"].spread(),
        "Gweights/s": shape.weights / encode["nf4lora"].median / 1e9,
        "Gweights/s, both": shape.weights / encode["both"].median / 1e9,
        "pack, bitsandbytes / ours": times(encode),
        "unpack, ms": decode["nf4lora"].spread(),
        "GB/s written": weight.nbytes / decode["nf4lora"].median / 1e9,
        "unpack, bitsandbytes / ours": times(decode, "nf4lora, new"),
        "of fill_": decode["fill_"].median / decode["nf4lora"].median,
        "of copy_": decode["copy_"].median / decode["nf4lora"].median,
    }


def check_packing(weight: torch.Tensor, qweight: torch.Tensor, absmax: torch.Tensor) -> bool | None:
    """Check the first rows against the reference, which is slow; returns whether bitsandbytes agrees on all rows."""
    rows = max(1, (1 << 20) // weight.shape[1])
    q, a = reference.nf4_quantize(weight[:rows].cpu())
    check_equal("nf4_quantize, codes", qweight[:rows].cpu(), q)
    check_equal("nf4_quantize, absmax", absmax[:rows].cpu(), a)
    unpacked = ops.nf4_dequantize(qweight, absmax)
    check_equal("nf4_dequantize", unpacked[:rows].cpu(), reference.nf4_dequantize(q, a))
    if not installed("bitsandbytes"):
        return None
    from bitsandbytes import functional as bnb

    codes, state = bnb.quantize_4bit(weight, quant_type="nf4")
    back = bnb.dequantize_4bit(codes, state)
    same = torch.equal(codes.flatten(), qweight.flatten()) and torch.equal(state.absmax, absmax.flatten())
    return same and torch.equal(back, unpacked)


def round_trip(samples: int) -> Table:
    rows: list[dict] = []
    for blocksize, published in PUBLISHED.items():
        errors = torch.tensor([error(blocksize, seed) for seed in range(samples)], dtype=torch.float64)
        mean = errors.mean(dim=0)
        off = (mean - torch.tensor(published)).abs() / errors.std(dim=0) if samples > 1 else None
        rows.append(
            {
                "blocksize": blocksize,
                "mean absolute error": f"{mean[0]:.6f}",
                "published, absolute": f"{published[0]:.6f}",
                "mean relative error": f"{mean[1]:.6f}",
                "published, relative": f"{published[1]:.6f}",
                "standard deviations off": None if off is None else off.max().item(),
            }
        )
    targets = []
    if samples > 1:
        worst = max(row["standard deviations off"] for row in rows)
        targets.append((f"within one standard deviation of every published value, got {worst:.2f}", worst <= 1.0))
    return Table(
        f"Round trip of N(0, 1), 1024 x 1024, mean of {samples} samples",
        rows,
        [
            "published: bitsandbytes, tests/test_functional.py::test_4bit_quant, 200 samples on an RTX 4090",
            "standard deviations: of one sample, the larger of both errors",
        ],
        targets,
    )


def error(blocksize: int, seed: int) -> tuple[float, float]:
    """Mean absolute and mean relative error of one sample."""
    x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(seed))  # a row holds the largest block
    difference = (x - ops.nf4_dequantize(*ops.nf4_quantize(x, blocksize), blocksize, torch.float32)).abs()
    return difference.mean().item(), (difference / (x.abs() + 1e-8)).mean().item()
