"""Runs a contender in a process of its own, with fresh memory and caches and no library that another has patched.

In the child process a contender is a generator, `contender(**arguments)` of a case's module. In the parent `next()`
lets it run to its next yield and returns the yielded value; `ask(...)` also sends it a value. So several contenders can
be alive and take turns.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[(__package__ or "").count(".") + 1]  # the folder that bench lies in


class Process:
    """A contender in a fresh Python process, with these variables added to its environment.

    Raises:
        RuntimeError: the process ended early; the text has the end of its output.
    """

    def __init__(self, module: str, environment: dict[str, str] | None = None, /, **arguments: object) -> None:
        self.name = f"{module}({', '.join(f'{key}={value}' for key, value in arguments.items())})"
        self.log = tempfile.TemporaryFile("w+")
        path = os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.child: Any = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.process", module, json.dumps(arguments, default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                **(environment or {}),
            },
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self.child.stdin.close()
        try:
            self.child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.log.close()

    def start(self, question: object = None) -> None:
        """Let the contender run on; result() waits for the value that it yields. Its yield returns `question`."""
        try:
            self.child.stdin.write(json.dumps(question) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            self.fail()

    def running(self, seconds: float) -> bool:
        """Whether the contender has not yielded after so many more seconds."""
        return not select.select([self.child.stdout], [], [], seconds)[0]

    def result(self) -> dict:
        line = self.child.stdout.readline()
        return json.loads(line) if line else self.fail()

    def __next__(self) -> dict:
        self.start()
        return self.result()

    def ask(self, **question: object) -> dict:
        """Send the contender, which waits in a yield, a dictionary; returns what it yields next."""
        self.start(question)
        return self.result()

    def fail(self) -> dict:
        self.child.wait()
        self.log.seek(0)
        raise RuntimeError(f"{self.name} ended with {self.child.returncode}:\n{self.log.read()[-2000:]}")


def anonymous_bytes(pid: int | str = "self") -> int:
    """Bytes of a process's memory that are not backed by a file."""
    return status(pid, "RssAnon")


def peak_bytes(device: str = "cpu") -> int:
    """The most memory that this process has used since `forget_peak`: resident on a CPU, allocated on a GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return status("self", "VmHWM")


def forget_peak(device: str = "cpu") -> None:
    """Measure the peak from now on."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # forbidden in some containers: the peak then includes loading
        Path("/proc/self/clear_refs").write_text("5")


def status(pid: int | str, key: str) -> int:
    """The value of a line of /proc/<pid>/status, in bytes."""
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    module, arguments = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not write between the answers
    steps = importlib.import_module(f"..cases.{module}", __package__).contender(**json.loads(arguments))
    for line in sys.stdin:
        print(json.dumps(steps.send(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
