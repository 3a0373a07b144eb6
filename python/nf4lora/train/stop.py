"""A request to end a run before its time."""

from __future__ import annotations


class StopRequest:
    """Whether somebody wants the run to end at the end of the running step, with a checkpoint.

    A run enters the request as a context before its first step and leaves it when its results are saved. This one
    waits until somebody sets `requested`, from another thread, say; that of the command line (cli/interrupt.py)
    listens for signals meanwhile.
    """

    requested = False

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        pass
