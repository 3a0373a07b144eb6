"""stdout and stderr during a run: if nobody can read them any more, training continues.

`nf4lora train ... | head` closes the pipe after ten lines, a terminal window is closed, a log file fills its disk, a
reader stops reading. In these cases an ordinary print, by nf4lora or by a library, raises an error or waits forever. A
print also raises UnicodeEncodeError if the terminal's encoding does not have a character of the data.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

PIECE = 512  # bytes; select says that a pipe can take this many (POSIX promises it for PIPE_BUF, at least 512)


class Stream:
    """A text stream whose write never fails, and never waits for a reader once `hurry()` is true."""

    def __init__(self, inner: Any, hurry: Callable[[], bool]) -> None:
        self.inner, self.hurry = inner, hurry
        self.gone = False  # whether the reader has gone for good
        self.encoding = getattr(inner, "encoding", None) or "utf-8"
        try:
            self.descriptor = inner.fileno()
        except (OSError, AttributeError, ValueError):  # a notebook's or a test's stream, which has none
            self.descriptor = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def write(self, text: str) -> int:
        data = text.encode(self.encoding, "backslashreplace")
        try:
            if self.descriptor is None:
                self.inner.write(data.decode(self.encoding))
            else:
                self._send(data)
        except (OSError, ValueError) as error:  # the reader is gone, the disk is full, the stream is closed
            self.gone = self.gone or getattr(error, "errno", None) in (errno.EPIPE, errno.EIO)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.inner.flush()

    def _send(self, data: bytes) -> None:
        while data:
            if not select.select([], [self.descriptor], [], 0.2)[1]:
                if self.hurry():
                    return  # nobody reads: what is left is not shown
                continue
            try:
                data = data[os.write(self.descriptor, data[:PIECE]) :]
            except BlockingIOError:  # somebody made the descriptor non-blocking
                time.sleep(0.05)
                if self.hurry():
                    return


@contextlib.contextmanager
def enduring_output(hurry: Callable[[], bool]) -> Iterator[None]:
    """Replace sys.stdout and sys.stderr by streams of this kind inside the block."""
    before = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # None where the descriptor was closed
            stream.flush()
    during = [stream and Stream(stream, hurry) for stream in before]
    sys.stdout, sys.stderr = during  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in during:
            if isinstance(stream, Stream):
                _discard_what_nobody_reads(stream)


def _discard_what_nobody_reads(stream: Stream) -> None:
    """If the reader has gone, redirect later output to /dev/null: Python's flush at exit would otherwise fail, with an
    error message and exit code 120."""
    try:
        stream.inner.flush()
    except (OSError, ValueError, AttributeError):
        stream.gone = True
    if stream.gone and stream.descriptor is not None:
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.descriptor)
            os.close(nowhere)
