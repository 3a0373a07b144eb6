"""Run the cases, print their tables, keep their results.

python -m bench                   all cases, into bench/results/<device>.json
python -m bench nf4 lora          two cases; the results of the others stay
python -m bench nf4 --quick       tiny sizes, takes seconds, keeps nothing
python -m bench tune              only by name: measures which kernel a GPU should take, and writes heuristics.json
python -m bench lora --clocks saturated --seconds 90    on a GPU: one time of the three, what fits into so many seconds
python -m bench --table           writes bench/results/<device>.md, and all targets into bench/README.md
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .harness import results
from .harness.case import MODEL, Absent, Settings, WrongAnswer
from .harness.machine import environment
from .harness.timing import NAMES, Watch, heading, warning, warning_before

CASES = (
    "nf4",
    "absmax",
    "lora",
    "overhead",
    "adamw",
    "isa",
    "bounds",
    "load",
    "train",
    "step",
    "eval",
    "soak",
    "generate",
    "converge",
    "optimizers",
    "perplexity",
)
EXPLICIT = ("tune",)  # run only if named, because it rewrites a file of the library


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.table:
        return write_table()
    if options.list:
        for name in (*CASES, *EXPLICIT):
            print(f"{name:<12}{case(name).QUESTION}")
        return 0
    settings = Settings(options.quick, options.device, options.model, tuple(options.clocks), options.seconds)
    machine = environment(settings.device)
    print(results.headline(machine), flush=True)
    if not options.quick and (text := warning_before()):
        print(f"warning: {text}", file=sys.stderr, flush=True)
    failed = False
    for name in options.case or CASES:
        failed |= not run(name, settings, machine, options.json)
    return int(failed)


def run(name: str, settings: Settings, machine: dict, json: Path | None) -> bool:
    """Run one case; returns False if an answer was wrong."""
    print(f"\n{name}: {case(name).QUESTION}\n", flush=True)
    try:
        with Watch() as watch:
            tables = case(name).run(settings)
    except Absent as absent:
        print(f"not run: {absent}", flush=True)
        return True
    except WrongAnswer as wrong:
        print(f"{name}: not timed, the answer is wrong: {wrong}", file=sys.stderr, flush=True)
        return False
    print("\n\n".join(table.markdown() for table in tables), flush=True)
    record = {
        "case": name,
        "question": case(name).QUESTION,
        "quick": settings.quick,
        "environment": machine,
        **watch.record(),
        "tables": [table.to_dict() for table in tables],
    }
    if not settings.quick and name not in results.UNTIMED and (text := warning(record)):
        print(f"warning: {name}: {text}", file=sys.stderr, flush=True)
    if json is not None:
        results.append(json, record)
    elif not settings.quick:
        print(f"\nkept in {results.keep(record)}", flush=True)
    return True


def case(name: str):
    return importlib.import_module(f".cases.{name}", __package__)


def write_table() -> int:
    if not results.README.is_file():
        print(f"bench: {results.README} is not there; run this in the repository", file=sys.stderr)
        return 1
    files = results.write(results.README)
    print(f"{results.README} now shows {', '.join(path.name for path in files) or 'no results'}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="Benchmarks of nf4lora, each beside the best rival that is installed.",
    )
    parser.add_argument(
        "case", nargs="*", help=f"{', '.join(CASES)}; all without one. By name alone: {', '.join(EXPLICIT)}"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: see that it runs; nothing is kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line per case here, keep nothing elsewhere")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the real model (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--clocks",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        metavar="CLOCK",
        help=f"on a GPU, which of {', '.join(map(heading, NAMES))} (as {', '.join(NAMES)}) lora and overhead show; all",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="on a GPU, lora and step begin no more rows after S seconds"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and what they answer")
    parser.add_argument(
        "--table", action="store_true", help="write the pages of bench/results, and bench/README.md's targets"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.case if name not in (*CASES, *EXPLICIT)]
    if unknown:
        parser.error(f"case must be one of {', '.join((*CASES, *EXPLICIT))}, got {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
