"""Does everything that needs a GPU: build for this machine's card, test, sanitize, measure, write the results.

    make gpu                      python tools/gpu.py
    make gpu ARGS=--quick         three minutes: fewer tests under the sanitizer, tiny benchmark sizes, nothing kept
    make gpu ARGS="build tests"   some of the parts
    make gpu ARGS="--minutes 5"   what decides, within so many minutes: see below

With --minutes a card that is lent for a short time is used in this order: the build, the CUDA tests of what changed
since the results that bench/results holds for it (all of them where it holds none), the layers' saturated times, the
host's part of a call, the programs of tools/probes, ncu on two calls. Each part has a limit of its own and none begins
when the time is up; what was left out is named. A log is written while its part runs, a benchmark's results when it
ends, and build/gpu/summary.json after each part, so that an interruption loses nothing that was measured before.
`--tune` adds tune; step, the sanitizers and table run where they are named: make gpu ARGS="--minutes 5 build step".

Compiling takes minutes of the card's time, unless a machine without a card has made the wheel before (torch with CUDA,
nvcc, and the versions of Python and torch that the machine with the card has), here for an H100 or H200:

    NF4LORA_CUDA=ON NF4LORA_CUDA_ARCHS=90a-real pip wheel --no-deps --no-build-isolation -w build/wheel .
    make gpu ARGS="--minutes 5 --wheel build/wheel/nf4lora-....whl"

The Python that runs this script needs torch with CUDA, nvcc, cmake, ninja, scikit-build-core, pybind11, pytest and
hypothesis; a network is not needed. The package is installed into build/gpu/site, so that this Python is not changed.
Rivals and trl may be absent; the output names those that are. If a part fails, the others still run, and the summary
and the exit code show the failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import touched

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu"
SITE = LOGS / "site"
NEEDED = ("cmake", "ninja", "scikit_build_core", "pybind11", "pytest", "hypothesis", "transformers", "peft")
WELCOME = ("bitsandbytes", "trl", "datasets")
SUFFIXED = {"90", "100", "120"}  # architectures whose own instructions need a suffix: sm_90a
ASK = """
import importlib.util, json, torch
card = {}
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    card = {"name": torch.cuda.get_device_name(), "architecture": f"{major}{minor}"}
names = %r
card["absent"] = [name for name in names if importlib.util.find_spec(name) is None]
print(json.dumps(card | {"torch": torch.__version__}))
"""
KERNEL_TESTS = (
    "tests/test_nf4.py",
    "tests/test_absmax.py",
    "tests/test_lora.py",
    "tests/test_adamw.py",
    "tests/test_unified.py",
)
HEURISTICS = "nf4lora/ops/kernels/heuristics.json"
PROBES = ROOT / "tools" / "probes"
NCU = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--set", "full")
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct" / "config.json"


@dataclass(frozen=True)
class Part:
    """A command with its limit. The word SECONDS becomes the time that a benchmark has to measure in."""

    name: str
    command: Sequence[str]
    limit_s: int

    def within(self, seconds: float) -> Part:
        """The part with what is left of the budget as its limit, if that is less."""
        limit = min(self.limit_s, int(seconds))
        spend = str(max(limit - STARTING_S, STARTING_S))
        return Part(self.name, [spend if word == SECONDS else word for word in self.command], limit)


SECONDS = "{seconds}"
STARTING_S = 20  # what a benchmark needs before it measures, and for the row that it is in when its time is up
LEAST_S = 10  # a part with less than that is not begun
# With --minutes, in this order; the others where they are named. probes: a part for each program.
BUDGETED = ("build", "tests", "saturated", "overhead", "probes", "ncu")
ON_REQUEST = ("step", "tune", "memcheck", "racecheck", "table")


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parse(arguments)
    card = ask()
    if "name" not in card:
        why = card.get("error") or f"none from torch {card['torch']}; nvidia-smi and `nf4lora doctor` say more"
        print(f"gpu: a CUDA device must answer torch, got {why}", file=sys.stderr)
        return 1
    print(f"{card['name']}, sm_{card['architecture']}, torch {card['torch']}", flush=True)
    for name in card["absent"]:
        print(f"absent: {name}" + ("" if name in WELCOME else ", which is needed"), flush=True)
    for tool in ("compute-sanitizer", "ncu"):
        if shutil.which(tool) is None:
            print(f"absent: {tool}, of the CUDA toolkit", flush=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    if options.minutes is None:
        chosen = [part for part in parts(card["architecture"], options.quick) if part.name in (options.part or names())]
        end = float("inf")
    else:
        chosen = budgeted(card, options)
        end = began + 60 * options.minutes
    outcomes = run_all(chosen, card["architecture"], end)
    print(f"\n{'part':<12}{'seconds':>8}  outcome   (logs in {LOGS.relative_to(ROOT)})")
    for name, seconds, outcome in outcomes:
        print(f"{name:<12}{seconds:>8.0f}  {outcome}")
    if left := [part.name for part in chosen[len(outcomes) :]]:
        print(f"left out: {', '.join(left)}")
    return int(any(outcome != "passed" for _, _, outcome in outcomes))


def run_all(chosen: Sequence[Part], architecture: str, end: float) -> list[tuple[str, float, str]]:
    """Run the parts until the time `end`; returns name, seconds and outcome of those that were begun.

    With an end, nothing follows a build that failed: it would measure an older one.
    """
    outcomes: list[tuple[str, float, str]] = []
    for part in chosen:
        left = end - time.monotonic()
        if left < LEAST_S:
            break
        limited = part if left == float("inf") else part.within(left)
        outcomes.append((part.name, *run(limited, architecture)))
        begun = [
            {"part": name, "seconds": round(seconds, 1), "outcome": outcome} for name, seconds, outcome in outcomes
        ]
        rest = [part.name for part in chosen[len(outcomes) :]]
        (LOGS / "summary.json").write_text(json.dumps({"begun": begun, "rest": rest}, indent=1) + "\n")
        if part.name == "build" and outcomes[-1][2] != "passed" and end != float("inf"):
            break
    return outcomes


def ask() -> dict:
    """The card as torch sees it, and the packages that are absent, found in a process of its own."""
    code = ASK % ((*NEEDED, *WELCOME),)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        return {"error": result.stderr.strip().splitlines()[-1] if result.stderr else f"exit code {result.returncode}"}
    return json.loads(result.stdout.splitlines()[-1])


def names() -> list[str]:
    return [part.name for part in parts("80", False)]


def parts(architecture: str, quick: bool) -> list[Part]:
    """The parts, in the order in which they run."""
    python = sys.executable
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    few = ["-k", "bfloat16 or 257"] if quick else []
    sanitize = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20"]
    bench = [python, "-m", "bench", "--device", "cuda"]
    cases = ["nf4", "absmax", "overhead", "adamw", *(["generate", "train"] if MODEL.is_file() else [])]
    if quick:
        last = [Part("bench", [*bench, "--quick", "nf4", "absmax", "lora", "overhead", "adamw", "step"], 120)]
    else:
        last = [
            Part("tune", [*bench, "tune"], 240),
            Part("bench", [*bench, *cases], 600),
            Part("lora", [*bench, "lora"], 900),
            Part("step", [*bench, "step"], 900),
            Part("table", [python, "-m", "bench", "--table"], 60),
        ]
    return [
        Part("build", [*pip, "--upgrade", "--target", str(SITE), "."], 420),
        Part("doctor", [python, "-m", "nf4lora", "doctor"], 60),
        Part("tests", [*tests, f"--junitxml={LOGS / 'tests.xml'}"], 300),
        Part("memcheck", [*sanitize, "--tool", "memcheck", *tests, *few, *KERNEL_TESTS], 60 if quick else 240),
        Part("racecheck", [*sanitize, "--tool", "racecheck", *tests, *few, *KERNEL_TESTS], 60 if quick else 240),
        *last,
    ]


def budgeted(card: dict, options: argparse.Namespace) -> list[Part]:
    """The parts of a run with --minutes, in the order in which they run."""
    python = sys.executable
    full = {part.name: part for part in parts(card["architecture"], options.quick)}
    bench = [python, "-m", "bench", "--device", "cuda", *(["--quick"] if options.quick else [])]
    build, tests = full["build"], full["tests"]
    if options.wheel is not None:
        build = Part("build", [*build.command[:-1], str(options.wheel.resolve())], 60)
    chosen = touched.tests(ROOT, touched.last_commit(ROOT, card["name"])) or touched.on_a_card(ROOT)
    every = [
        build,
        Part("tests", [*tests.command, *chosen], 90),
        Part("saturated", [*bench, "lora", "--clocks", "saturated", "--seconds", SECONDS], 150),
        Part("overhead", [*bench, "overhead"], 60),
        *(Part(f"probe-{path.stem}", probe(path, card["architecture"]), 30) for path in sorted(PROBES.glob("*.cu"))),
        *([Part("ncu", [*NCU, python, "tools/two_calls.py"], 60)] if shutil.which("ncu") else []),
        Part("step", [*bench, "step", "--seconds", SECONDS], 240),
        *(full[name] for name in ON_REQUEST if name in full and name != "step"),
    ]
    wanted = {*(options.part or BUDGETED), *(["tune"] if options.tune else [])}
    return [part for part in every if ("probes" if part.name.startswith("probe-") else part.name) in wanted]


def probe(source: Path, architecture: str) -> list[str]:
    """The command that compiles a program of tools/probes for this card and runs it."""
    program = LOGS / source.stem
    compiled = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{suffixed(architecture)}", "-o", str(program), str(source)]
    return ["sh", "-c", f"{shlex.join(compiled)} && exec {shlex.quote(str(program))}"]


def suffixed(architecture: str) -> str:
    """
    >>> suffixed("90"), suffixed("89")
    ('90a', '89')
    """
    return architecture + ("a" if architecture in SUFFIXED else "")


def run(part: Part, architecture: str) -> tuple[float, str]:
    """Run a part, with output to the terminal and a log; returns its seconds, and "passed" or what went wrong."""
    print(f"\n== {part.name}: {' '.join(part.command)}", flush=True)
    env = os.environ | {"NF4LORA_CUDA": "ON", "NF4LORA_CUDA_ARCHS": f"{suffixed(architecture)}-real"}
    env["NF4LORA_REQUIRE_CUDA"] = "1"
    env["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    start, log = time.monotonic(), LOGS / f"{part.name}.log"
    try:
        child = subprocess.Popen(
            part.command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        return time.monotonic() - start, f"failed: {part.command[0]} is not there"
    timer = threading.Timer(part.limit_s, os.killpg, (child.pid, signal.SIGKILL))  # the child and its children
    timer.start()
    with child, log.open("w") as file:
        for line in child.stdout or ():
            file.write(line)
            print(line, end="", flush=True)
    timer.cancel()
    seconds = time.monotonic() - start
    if seconds >= part.limit_s:
        return seconds, f"failed: stopped after {part.limit_s} s"
    if child.returncode:
        return seconds, f"failed: exit code {child.returncode}"
    if part.name == "tune":  # the next parts use the new rules
        shutil.copy(ROOT / "python" / HEURISTICS, SITE / HEURISTICS)
    if part.name == "tests" and (skipped := skips(LOGS / "tests.xml")):
        return seconds, f"failed: {len(skipped)} tests skipped, the first because {skipped[0]}"
    return seconds, "passed"


def skips(report: Path) -> list[str]:
    """The reasons for which tests were skipped, except absent packages."""
    skipped = [(skip.get("message", ""), skip.text or "") for skip in ElementTree.parse(report).iter("skipped")]
    return [why for why, where in skipped if not re.search("could not import|is not installed", why + where)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tools/gpu.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="*", help=f"{', '.join(names())}; all without one")
    parser.add_argument("--quick", action="store_true", help="three minutes; the benchmark's sizes mean nothing")
    parser.add_argument("--minutes", type=float, metavar="M", help="only what decides, within so many minutes")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="with --minutes: install this wheel, build nothing")
    parser.add_argument("--tune", action="store_true", help="with --minutes: tune as well")
    options = parser.parse_args(arguments)
    known = names()
    if options.minutes is not None:
        known = [*BUDGETED, *ON_REQUEST]
    elif options.wheel is not None or options.tune:
        parser.error("--wheel and --tune must come with --minutes")
    unknown = [name for name in options.part if name not in known]
    if unknown:
        parser.error(f"part must be one of {', '.join(known)}, got {', '.join(unknown)}")
    if options.wheel is not None and not options.wheel.is_file():
        parser.error(f"--wheel must name a file, got {options.wheel}")
    return options


if __name__ == "__main__":
    sys.exit(main())
