"""A card that computes nothing: torch's CUDA build runs without a GPU.

A library that is put before CUDA's runtime, its driver and cuBLAS (LD_PRELOAD) keeps tensors on "cuda" in the host's
memory. Kernels and products are launched and do nothing; copies and fills are done at once; every call is counted, and
streams are captured into graphs by CUDA's rules. So results are those of memory that nobody wrote, mostly zeros, and
what can be asked is what a call does to a card, how often, and how long the host takes for it. What looks at a result,
as quantising a weight does to refuse NaN, is done on the CPU and moved.

    def add():                      # in a module: the child process imports it from its file
        x = torch.ones(4, device="cuda")
        return lambda: x + x        # what is counted

    with Card() as card:
        assert card.counted(add).launches == 1

The C++ files: `counts.cpp` counts; `device.cpp`, `errors.cpp`, `driver.cpp`, `memory.cpp`, `streams.cpp`, `capture.cpp`
and `launches.cpp` are the runtime, `blas.cpp` the products. Functions that they lack end the process with their name.
`operators.cpp` is compiled with the ops of csrc/cuda. Times on it hold no time of CUDA's own.
"""

from .asking import Card
from .build import environment, operators, reason
from .counts import Counts, counting
from .loading import load

__all__ = ["Card", "Counts", "counting", "environment", "load", "operators", "reason"]
