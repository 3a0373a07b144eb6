"""A status line that says what is happening. A terminal shows one line that changes; a log gets a new line at times.

    with Status("converting the model") as status:
        status("3 of 12 tensors")

This file needs only the standard library, because it also shows what pip does before anything is installed.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

REWRITE_S = 0.2  # on a terminal
EVERY_S = 3.0  # between two lines elsewhere


class Status:
    """Shows a title, a detail and the seconds since the block was entered.

    A thread writes the line, so that it appears while the block computes. If the stream is not a terminal, `every` is
    the time in seconds between two lines.
    """

    def __init__(self, title: str, stream: TextIO | None = None, every: float = EVERY_S) -> None:
        self.title, self.stream, self.every = title, stream or sys.stderr, every
        self.detail, self.failure = "", ""
        self.is_terminal = self.stream.isatty()
        self.began = time.monotonic()
        self.finished = threading.Event()
        self.writing = threading.Lock()
        self.thread = threading.Thread(target=self._show, daemon=True)

    def __call__(self, detail: str) -> None:
        """Set the detail: what is happening now."""
        self.detail = detail

    def note(self, line: str) -> None:
        """Write a line that stays."""
        self._write(f"  {line}\n")

    def fail(self, why: str) -> None:
        """Mark the block as failed; its last line then ends with `why`."""
        self.failure = why

    def __enter__(self) -> Status:
        if not self.is_terminal:
            self._write(f"{self.title}\n")
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finished.set()
        self.thread.join()
        outcome = self.failure or (f"stopped by {kind.__name__}" if kind else "done")
        self._write(f"{self.title}: {outcome} after {self._seconds()} s\n")

    def _seconds(self) -> int:
        return round(time.monotonic() - self.began)

    def _show(self) -> None:
        while not self.finished.wait(REWRITE_S if self.is_terminal else self.every):
            line = f"{self.title}{': ' if self.detail else ''}{self.detail}, {self._seconds()} s"
            if self.is_terminal:
                self._write(line[: shutil.get_terminal_size().columns - 1])
            else:
                self._write(f"  {line}\n")

    def _write(self, text: str) -> None:
        with self.writing:
            self.stream.write(("\r\x1b[K" if self.is_terminal else "") + text)
            self.stream.flush()
