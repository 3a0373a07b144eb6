"""How work on a card is captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """How work is captured. The tests have one for a CPU."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work, where it will be captured."""

    def record(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
        """Capture the work: its results, and a function that does it again and writes into the same results."""


class CudaRecorder:
    """Captures on a stream of its own, all graphs in one pool of memory."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
        graph = torch.cuda.CUDAGraph()
        # Calls of other threads must not spoil the capture, such as those that pin memory for a batch.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            results = work()
        return results, graph.replay
