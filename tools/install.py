"""Runs pip with a status line that says what pip is fetching, how large that is, and what it is doing.

    python tools/install.py TITLE COMMAND [PIP ARGUMENTS]      COMMAND is install, wheel or download

The script runs the pip of its own Python. If pip fails, all of pip's output is printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from status import EVERY_S, Status

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# Downloads of this size and more are printed on a line that stays; smaller ones take too little time.
LARGE = 20 << 20
UNITS = {"bytes": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}


class Reader:
    """Turns the lines that pip prints into a few words for the status."""

    def __init__(self, tell: Callable[[str], None], note: Callable[[str], None]) -> None:
        self.tell, self.note = tell, note  # what is happening now; a line that stays

    def __call__(self, line: str) -> None:
        text = line.strip()
        if match := re.match(r"(?:Downloading|Using cached) (\S+\.(?:whl|tar\.gz|zip)) \(([\d.]+) (\w+)\)", text):
            self.archive(match[1].rpartition("/")[2], int(float(match[2]) * UNITS.get(match[3], 1)))
        elif (match := re.match(r"Processing (\S+\.(?:whl|tar\.gz|zip))", text)) and os.path.isfile(match[1]):
            self.archive(Path(match[1]).name, os.path.getsize(match[1]))
        elif match := re.match(r"Collecting (\S+)", text):
            self.tell(f"looking for {match[1]}")
        elif match := re.match(r"Installing collected packages: (.*)", text):
            packages = match[1].split(", ")
            self.tell(f"unpacking {packages[0] if len(packages) == 1 else f'{len(packages)} packages'}")
        elif match := re.match(r"\[(\d+)/(\d+)\] (?:Building|Linking) .*?([\w.]+?)(?:\.o)?$", text):  # ninja's
            self.tell(f"compiling {match[1]} of {match[2]}, {match[3]}")
        elif match := re.match(r"(Installing build dependencies|Building wheel for [\w.-]+)", text):
            self.tell(match[1][0].lower() + match[1][1:])

    def archive(self, name: str, size: int) -> None:
        package = " ".join(name.split("-")[:2])
        words = f"{package}, {size / 1e6:.1f} MB"
        self.tell(f"fetching {words}")
        if size >= LARGE:
            self.note(words)


def run(title: str, command: Sequence[str], every: float = EVERY_S) -> int:
    """Run pip under a status; returns its exit code, and prints all of its output if that is not 0."""
    output: list[str] = []
    with Status(title, every=every) as status:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1
        ) as child:
            assert child.stdout is not None
            reader = Reader(status, status.note)
            for line in child.stdout:
                output.append(line)
                reader(line)
            code = child.wait()
        if code:
            status.fail(f"failed with exit code {code}")
    if code:
        sys.stderr.write("".join(output))
    return code


def main(arguments: Sequence[str]) -> int:
    title, verb, *options = arguments
    return run(title, [*PIP, verb, "--progress-bar", "off", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
