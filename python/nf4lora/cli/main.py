"""The command line: `nf4lora <command>`. Each command imports what it needs once its options are understood."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from nf4lora.compat import library

USAGE = """\
usage: nf4lora <command> [options]

  train     fine-tune a model on your data       nf4lora train --help
  doctor    what was loaded, what was not, and what mends it

  --version, --help"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"nf4lora {library.version()}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else f"; commands are {', '.join(COMMANDS)}"
        return _fail(f"nf4lora: {words[0]!r} is no command{meant}", 2)
    return command(words[1:])


def _train(arguments: list[str]) -> int:
    from nf4lora.cli import train

    return train.main(arguments)


def _doctor(arguments: list[str]) -> int:
    if arguments:
        return _fail("usage: nf4lora doctor", 0 if arguments[0] in ("-h", "--help") else 2)
    from nf4lora.cli import doctor

    return doctor.main()


def _fail(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


COMMANDS: dict[str, Callable[[list[str]], int]] = {"train": _train, "doctor": _doctor}
