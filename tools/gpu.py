"""Does everything that needs a GPU: build for this machine's card, test, sanitize, measure, write the results.

    make gpu                      python tools/gpu.py
    make gpu ARGS=--quick         three minutes: fewer tests under the sanitizer, tiny benchmark sizes, nothing kept
    make gpu ARGS="build tests"   some of the parts

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
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct" / "config.json"


@dataclass(frozen=True)
class Part:
    name: str
    command: Sequence[str]
    limit_s: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    card = ask()
    if "name" not in card:
        why = card.get("error") or f"none from torch {card['torch']}; nvidia-smi and `nf4lora doctor` say more"
        print(f"gpu: a CUDA device must answer torch, got {why}", file=sys.stderr)
        return 1
    print(f"{card['name']}, sm_{card['architecture']}, torch {card['torch']}", flush=True)
    for name in card["absent"]:
        print(f"absent: {name}" + ("" if name in WELCOME else ", which is needed"), flush=True)
    if shutil.which("compute-sanitizer") is None:
        print("absent: compute-sanitizer, of the CUDA toolkit", flush=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts(card["architecture"], options.quick) if part.name in (options.part or names())]
    outcomes = [(part.name, *run(part, card["architecture"])) for part in chosen]
    print(f"\n{'part':<12}{'seconds':>8}  outcome   (logs in {LOGS.relative_to(ROOT)})")
    for name, seconds, outcome in outcomes:
        print(f"{name:<12}{seconds:>8.0f}  {outcome}")
    return int(any(outcome != "passed" for _, _, outcome in outcomes))


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
    bench = [python, "-m", "bench", "--device", "cuda", "nf4", "absmax", "lora", "adamw"]
    if not quick and MODEL.is_file():
        bench += ["generate", "step", "train"]
    return [
        Part("build", [*pip, "--upgrade", "--target", str(SITE), "."], 420),
        Part("doctor", [python, "-m", "nf4lora", "doctor"], 60),
        Part("tests", [*tests, f"--junitxml={LOGS / 'tests.xml'}"], 300),
        Part("memcheck", [*sanitize, "--tool", "memcheck", *tests, *few, *KERNEL_TESTS], 60 if quick else 240),
        Part("racecheck", [*sanitize, "--tool", "racecheck", *tests, *few, *KERNEL_TESTS], 60 if quick else 240),
        *([] if quick else [Part("tune", [python, "-m", "bench", "--device", "cuda", "tune"], 240)]),
        Part("bench", [*bench, *(["--quick"] if quick else [])], 60 if quick else 600),
        *([] if quick else [Part("table", [python, "-m", "bench", "--table"], 60)]),
    ]


def run(part: Part, architecture: str) -> tuple[float, str]:
    """Run a part, with output to the terminal and a log; returns its seconds, and "passed" or what went wrong."""
    print(f"\n== {part.name}: {' '.join(part.command)}", flush=True)
    real = architecture + ("a" if architecture in SUFFIXED else "") + "-real"
    env = os.environ | {"NF4LORA_CUDA": "ON", "NF4LORA_CUDA_ARCHS": real, "NF4LORA_REQUIRE_CUDA": "1"}
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
    options = parser.parse_args(arguments)
    unknown = [name for name in options.part if name not in names()]
    if unknown:
        parser.error(f"part must be one of {', '.join(names())}, got {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
