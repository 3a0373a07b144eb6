"""What a call does to the card, in a process that sees it."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SYNCHRONISATIONS = (  # with all calls that wait until the card has done something
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    *("cudaMemcpy", "cudaMemset"),
)


@dataclass
class Counts:
    """Counts of what happened inside `counting()`.

    launches: kernels and products of cuBLAS, those that were captured included
    kernels: launches by name, without namespaces and arguments of templates: {"lora_gemm_kernel": 1, "cublasGemmEx": 1}
    captured: launches that went into a graph and did not run
    allocations: tensors and work space asked of torch's allocator; bytes: their most at one time, beyond what was there
    mallocs: cudaMalloc, frees: cudaFree, which torch's allocator calls where it has no memory left
    copies, fills: cudaMemcpyAsync and its kin, cudaMemsetAsync and its kin
    events, waits: events that were recorded, and streams that were made to wait for one
    synchronisations, queries: calls in which the host waits for the card, and in which it asks whether it has finished
    replays: graphs that were launched
    calls: of each function of CUDA and cuBLAS, by name
    """

    calls: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    launches: int = 0
    captured: int = 0
    allocations: int = 0
    bytes: int = 0
    mallocs: int = 0
    frees: int = 0
    copies: int = 0
    fills: int = 0
    events: int = 0
    waits: int = 0
    synchronisations: int = 0
    queries: int = 0
    replays: int = 0

    def _fill(self, text: str, allocations: int, most_bytes: int) -> None:
        """From what counts.cpp and torch's allocator say."""
        answer = json.loads(text)
        self.calls = calls = answer["calls"]
        kernels: Counter[str] = Counter()
        for launches in (answer["launches"], answer["captured"]):
            for name, count in launches.items():
                kernels[short(name)] += count
        self.kernels = dict(kernels)
        self.launches = sum(kernels.values())
        self.captured = sum(answer["captured"].values())
        self.allocations, self.bytes = allocations, most_bytes

        def total(*names: str) -> int:
            return sum(calls.get(name, 0) for name in names)

        self.mallocs, self.frees = total("cudaMalloc"), total("cudaFree")
        self.copies = total("cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaMemcpy")
        self.fills = total("cudaMemsetAsync", "cudaMemset")
        self.events, self.waits = total("cudaEventRecord", "cudaEventRecordWithFlags"), total("cudaStreamWaitEvent")
        self.synchronisations = total(*SYNCHRONISATIONS)
        self.queries = total("cudaStreamQuery", "cudaEventQuery")
        self.replays = total("cudaGraphLaunch")


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts what is done inside; the object is filled at the end.

    Raises:
        RuntimeError: this process does not see the card (environment() has the variables that it needs).
    """
    import torch

    library = ctypes.CDLL(None)
    if not hasattr(library, "nf4lora_card_counts"):
        raise RuntimeError("counting: the process must see the card, got one without; start it with environment()")
    library.nf4lora_card_counts.restype = ctypes.c_char_p
    counts = Counts()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    library.nf4lora_card_reset()
    try:
        yield counts
    finally:
        text = library.nf4lora_card_counts().decode()
        after = torch.cuda.memory_stats()
        allocated = "allocation.all.allocated"
        most = after.get("allocated_bytes.all.peak", 0) - before.get("allocated_bytes.all.current", 0)
        counts._fill(text, after.get(allocated, 0) - before.get(allocated, 0), most)


def short(name: str) -> str:
    """A kernel's name without return type, namespaces, and arguments of templates and of the function.

    >>> short("void at::native::(anonymous namespace)::reduce_kernel<512, Op<float (*)(int)>>(Op<float (*)(int)>)")
    'reduce_kernel'
    >>> short("nf4lora::cuda::(anonymous namespace)::scale(float*, int)"), short("cublasGemmEx")
    ('scale', 'cublasGemmEx')
    """
    plain = name.replace("(anonymous namespace)", "")
    end = min(plain.find(mark) % (len(plain) + 1) for mark in "<(")
    return plain[:end].split(" ")[-1].split("::")[-1]
