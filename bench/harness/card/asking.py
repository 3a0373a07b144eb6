"""Asks a process that sees the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from ..nvcc import ROOT
from . import build
from .counts import Counts


class Card:
    """A Python process with the card, nf4lora, and its ops for CUDA tensors; it starts with the first question.

    A question is a function of a module: the process imports it from its file, with that file's folder on the path,
    calls it with arguments that JSON can carry, and sends back what it returns.

        card.ask(function, tokens=16)       # its result
        card.counted(function, tokens=16)   # it returns a call, which is counted after two calls that warm up

    Args:
        limit: bytes of the card's memory, else those of an H200

    Raises (of the questions):
        RuntimeError: the function raised, or the process ended; the text has the traceback, or the end of its output.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.child: Any = None

    def __enter__(self) -> Card:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.child is not None:
            self.child.stdin.close()
            try:
                self.child.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
            self.child.stdout.close()
            self.log.close()
            self.child = None

    def ask(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """What the function returns there."""
        return self._answer(function, arguments, counted=False)

    def counted(self, function: Callable[..., Callable[[], object]], *, warm: int = 2, **arguments: Any) -> Counts:
        """What the call does to the card that the function returns, after `warm` calls of it."""
        return Counts(**self._answer(function, arguments, counted=True, warm=warm))

    def _answer(self, function: Callable, arguments: dict, **how: Any) -> Any:
        if self.child is None:
            self._start()
        where = {"file": function.__code__.co_filename, "name": function.__qualname__}
        try:
            self.child.stdin.write(json.dumps({**where, "arguments": arguments, **how}) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.child.wait()
            self.log.seek(0)
            text = f"the card's process ended with {self.child.returncode}:\n{self.log.read()[-4000:]}"
            self.__exit__()
            raise RuntimeError(text)
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def _start(self) -> None:
        library = build.operators()
        self.log = tempfile.TemporaryFile("w+")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.child = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.child", str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **build.environment(self.limit)},
        )
