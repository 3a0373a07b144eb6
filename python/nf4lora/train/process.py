"""What the libraries that train change in the process, put back at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unchanged_process() -> Iterator[None]:
    """At the end, environment, log level and determinism are what they were at the beginning.

    transformers' Trainer sets the log level of its library, and with `deterministic` environment variables and torch's
    own switches. Not put back are the random state, which a run seeds, as callers of a training function expect, and
    what libraries keep for themselves: their modules, caches and accelerate's idea of the process.
    """
    import torch
    from transformers.utils import logging

    environment, verbosity = dict(os.environ), logging.get_verbosity()
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        logging.set_verbosity(verbosity)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
