"""Requests to stop: the first asks for a checkpoint at the end of the running step, a second Ctrl-C ends at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from types import FrameType
from typing import Any

from nf4lora.train.stop import StopRequest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_EVENT = 1.0  # seconds within which a second signal belongs to the first


class Interrupt(StopRequest):
    """A context in which a signal sets `requested` instead of killing the run.

    SIGHUP (the terminal was closed, the connection was lost) may come several times for one event, so it never counts
    as the second request. A signal within a second of the first does not count either, because `timeout` and others
    signal a process and then its whole group. A signal that was ignored when the program started stays ignored: `nohup`
    ignores SIGHUP so that a program continues without its terminal.

    >>> with Interrupt() as interrupt:
    ...     interrupt.requested
    False
    """

    def __init__(self) -> None:
        self._asked: float | None = None  # when the first request came
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids handlers
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by another language

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            now = time.monotonic()
            if self._asked is None:
                self._asked = now
            elif now - self._asked > ONE_EVENT:
                raise KeyboardInterrupt
            else:
                return
        self.requested = True
        _tell(b"\nstopping at the end of this step, with a checkpoint; once more to stop at once\n")


def _tell(text: bytes) -> None:
    """Write to stderr from a signal handler, if the write would not block. The signal may have interrupted a print, so
    this does not use print."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, text)
