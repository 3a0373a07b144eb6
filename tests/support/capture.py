"""Captures calls in CUDA graphs, on the card that computes nothing."""

import torch

from bench.harness.card import counting


def capture(call, **options):
    """The graph of a call, after calls that warm up beside it; and what capturing did."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options), counting() as done:
        call()
    return graph, done
