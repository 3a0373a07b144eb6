"""`nf4lora train`: a run in a process of its own, with the changes that only such a process may make.

The command takes Ctrl-C, SIGTERM and SIGHUP as requests to stop, continues if its output cannot be written, hides the
cards that it does not use, and silences the libraries. `nf4lora.train.run.train` itself does none of this.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nf4lora.cli.interrupt import Interrupt
from nf4lora.cli.streams import enduring_output
from nf4lora.compat import library
from nf4lora.train.errors import RunError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from nf4lora.train.settings import TrainConfig

NEEDED = ("yaml", "rich", "datasets", "trl")


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    from nf4lora.train.arguments.parse import parse_arguments
    from nf4lora.train.settings import help_text

    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return _fail(f"nf4lora train: needs {', '.join(missing)}; pip install 'nf4lora[train]'", 1)
    try:
        config = parse_arguments(arguments)
        compiled, *_ = library.load("_C", "quantization.quantizer", "train.run")
        try:
            compiled.cpu_instruction_set()
        except ValueError as error:  # NF4LORA_CPU names no instruction set of this processor
            raise UsageError(str(error)) from None
        return train(config)
    except UsageError as error:
        return _fail(f"nf4lora train: {error}", 2)
    except RunError as error:
        return _fail(f"nf4lora train: {error}", 1)
    except ImportError as error:
        if "nf4lora: " not in str(error):
            raise
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("nf4lora train: interrupted at once; a checkpoint that was being written is not used", 130)


def _fail(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def train(config: TrainConfig, console: Console | None = None) -> int:
    """Run a training that has this process for itself; returns the exit code.

    Raises:
        UsageError, RunError: with the text to print.
    """
    from nf4lora.cli.cards import choose_card
    from nf4lora.train import run
    from nf4lora.train.device import check_one_process

    interrupt = Interrupt()
    with enduring_output(lambda: interrupt.requested):
        try:
            quiet()
            check_one_process()
            return run.train(config, console, interrupt, choose_card(config.device), downloads_shown)
        except (UsageError, RunError):
            if config.traceback:
                traceback.print_exc()
            raise


def quiet() -> None:
    """Silence the libraries' progress bars and advice: nf4lora prints what a user needs to know."""
    # PEFT imports bitsandbytes, which warns of an absent package that is not needed here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import huggingface_hub.constants
    import transformers

    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # for processes started from here; this one has read it already
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|trl|peft|accelerate|datasets)(\..*)?")


@contextmanager
def downloads_shown() -> Iterator[None]:
    """Show the libraries' progress bars inside: a data set that is fetched from the Hub may take long."""
    import datasets
    import huggingface_hub

    datasets.enable_progress_bars()
    huggingface_hub.utils.enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
