"""Two calls of lora_linear for a profiler that waits: `ncu --profile-from-start off python tools/two_calls.py`.

The two kernels that the forward pass chooses between for many tokens, once each, on a layer of Llama-3.1-8B.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

import torch

from nf4lora import ops
from nf4lora.ops.kernels import dispatch

N, K, RANK, TOKENS = 14336, 4096, 16, 2048


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/two_calls.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny layer")
    options = parser.parse_args(arguments)
    size, tokens = ((64, 128), 32) if options.quick else ((N, K), TOKENS)
    weight = torch.randn(size, device=options.device).mul_(0.02).bfloat16()
    qweight, scales = ops.nf4_quantize(weight)
    packed = (qweight, *ops.absmax_quantize(scales))
    x = torch.randn(tokens, size[1], device=options.device).bfloat16()
    A, B = (torch.randn(shape, device=options.device) for shape in ((RANK, size[1]), (size[0], RANK)))
    on_card = options.device == "cuda"

    def call(kernel: str) -> None:
        with torch.no_grad(), dispatch.forcing(kernel):
            ops.lora_linear(x, *packed, lora_A=A, lora_B=B)

    kernels = dispatch.CHOICES["forward"][-2:]
    for kernel in kernels:  # what is compiled or allocated at the first call is not profiled
        call(kernel)
    if on_card:
        torch.cuda.synchronize()
    with torch.cuda.profiler.profile() if on_card else contextlib.nullcontext():
        for kernel in kernels:
            call(kernel)
            print(f"{kernel}: {tokens} tokens, {size[0]} x {size[1]}", flush=True)
        if on_card:
            torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
