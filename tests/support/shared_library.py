"""What tests compile from C++. It is kept in build/fakes until a source, a flag or the compiler changes: compiling
takes longer than the tests, and a second run of them, on another torch say, needs the same files."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "fakes"


def compile_library(name: str, sources: list[Path], flags: list[str]) -> Path:
    """The library of these sources, which may include what lies beside the first of them and all of csrc.

    $CXXFLAGS come last: those of the sanitizers, in tools/sanitize.sh.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = [*flags, "-shared", "-fPIC"]
    more = os.environ.get("CXXFLAGS", "").split()
    return compiled(f"{name}.so", [compiler, *flags, f"-I{sources[0].parent}", f"-I{ROOT / 'csrc'}", *more], sources)


def compiled(name: str, command: list[str], sources: list[Path]) -> Path:
    """What `command`, which begins with a compiler, makes of these sources, under this name."""
    stem, suffix = Path(name).stem, Path(name).suffix
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # is not the compiler's
    kind = f"{stem}-{hashlib.sha256(' '.join(command).encode()).hexdigest()[:8]}"
    digest = hashlib.sha256(subprocess.run([command[0], "--version"], capture_output=True, env=environment).stdout)
    for path in sorted({*sources, *sources[0].parent.glob("*.*"), *(ROOT / "csrc").rglob("*.*")}):
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    kept = KEPT / f"{kind}-{digest.hexdigest()[:16]}{suffix}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process beside this one waits for the file, and does not make it too
        if kept.exists():
            return kept
        with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
            made = Path(scratch) / kept.name
            whole = [*command, *map(str, sources), "-o", str(made)]
            if suffix == ".so":
                whole += ["-lstdc++"]  # which a compiler called gcc leaves out
            result = subprocess.run(whole, capture_output=True, text=True, env=environment)
            assert result.returncode == 0, result.stderr
            for stale in KEPT.glob(f"{kind}-*{suffix}"):
                stale.unlink(missing_ok=True)
            os.replace(made, kept)  # at once, so that a process beside this one finds all of it or nothing
    return kept
