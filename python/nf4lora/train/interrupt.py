"""Requests to stop: the first asks for a checkpoint at the end of the running step, a second Ctrl-C ends at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """A context in which a signal sets `requested` instead of killing the run.

    SIGHUP (the terminal was closed, the connection was lost) may come several times for one event, so it never counts
    as the second request. A signal that was ignored when the program started stays ignored: that is how `nohup` asks a
    program to go on without its terminal.

    >>> with Interrupt() as interrupt:
    ...     interrupt.requested
    False
    """

    def __init__(self) -> None:
        self.requested = False
        self._asked_by_hand = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for each in SIGNALS:
                if signal.getsignal(each) != signal.SIG_IGN:
                    self._before[each] = signal.signal(each, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by another language

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            if self._asked_by_hand:
                raise KeyboardInterrupt
            self._asked_by_hand = True
        self.requested = True
        _tell(b"\nstopping at the end of this step, with a checkpoint; once more to stop at once\n")


def _tell(text: bytes) -> None:
    """Write to stderr from a signal handler: not by print, which the signal may have come in the middle of, and only
    if somebody reads."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, text)
