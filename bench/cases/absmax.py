"""absmax: time and size of double quantisation, which stores the scales in 8 bits."""

from __future__ import annotations

import torch

from nf4lora import NF4Linear, ops
from nf4lora.ops import reference

from ..harness.case import Settings, check_equal, installed, without
from ..harness.shapes import QUICK, SHAPES, Shape
from ..harness.table import Table
from ..harness.timing import alternate, rotation

QUESTION = "What do the scales of a weight cost in time and in bits?"


def run(settings: Settings) -> list[Table]:
    shapes = QUICK if settings.quick else SHAPES
    rows = [row(shape, settings) for shape in shapes]
    large = [cells["bits per weight"] for shape, cells in zip(shapes, rows, strict=True) if shape.weights >= 1 << 22]
    differing = [cells["codes unlike bitsandbytes', %"] for cells in rows]
    targets = []
    if large:
        worst = max(large)
        targets.append((f"4.127 bits per weight in layers of 4 M weights or more, got {worst:.4f}", worst < 4.1275))
    if None not in differing:
        claim = f"at most 0.5 % of the codes differ from bitsandbytes', got {max(differing):.2f} %"
        targets.append((claim, max(differing) <= 0.5))
    return [
        Table(
            "Double quantisation of the scales of a weight, blocksize 64",
            rows,
            [
                "bitsandbytes / ours: its time over ours for mean, quantize_blockwise and back, as its Linear4bit does",
                "bits per weight: codes, scales, nested scales and offset as NF4Linear stores them; "
                "without double quantisation 4.5",
                *without("bitsandbytes"),
            ],
            targets,
        )
    ]


def row(shape: Shape, settings: Settings) -> dict:
    device, limit = settings.device, 0.1 if settings.quick else 1.0
    weight = torch.randn(shape.N, shape.K, device=device).mul_(0.02).bfloat16()
    _, absmax = ops.nf4_quantize(weight)
    absmax_q, nested = ops.absmax_quantize(absmax)
    expected_q, expected_nested = reference.absmax_quantize(absmax.cpu())
    check_equal("absmax_quantize, codes", absmax_q.cpu(), expected_q)
    check_equal("absmax_quantize, nested", nested.cpu(), expected_nested)
    decoded = reference.absmax_dequantize(expected_q, expected_nested)
    check_equal("absmax_dequantize", ops.absmax_dequantize(absmax_q, nested).cpu(), decoded)

    scales = rotation(lambda _: absmax.clone(), absmax.nbytes, device)
    codes = rotation(lambda _: absmax_q.clone(), absmax_q.nbytes, device)
    encoders = {"nf4lora": lambda: ops.absmax_quantize(next(scales))}
    decoders = {"nf4lora": lambda: ops.absmax_dequantize(next(codes), nested)}
    differing = None
    if installed("bitsandbytes"):
        from bitsandbytes import functional as bnb

        def encode() -> tuple:
            values = next(scales)
            offset = values.mean()
            return *bnb.quantize_blockwise(values - offset, blocksize=256), offset

        rival_codes, state, offset = encode()
        differing = 100 * (rival_codes.flatten() != absmax_q.flatten()).double().mean().item()
        encoders["bitsandbytes"] = encode
        decoders["bitsandbytes"] = lambda: bnb.dequantize_blockwise(next(codes), state).add_(offset)
    encoded = alternate(encoders, seconds=limit, device=device)
    back = alternate(decoders, seconds=limit, device=device)
    packed = NF4Linear.pack(weight)
    return {
        "layer": shape.name,
        "scales": absmax.numel(),
        "encode, ms": encoded["nf4lora"].spread(),
        "encode, bitsandbytes / ours": encoded["bitsandbytes"].over(encoded["nf4lora"])
        if "bitsandbytes" in encoded
        else None,
        "decode, ms": back["nf4lora"].spread(),
        "decode, bitsandbytes / ours": back["bitsandbytes"].over(back["nf4lora"]) if "bitsandbytes" in back else None,
        "codes unlike bitsandbytes', %": differing,
        "bits per weight": 8 * sum(tensor.nbytes for tensor in packed.values()) / shape.weights,
    }
