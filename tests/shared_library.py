"""Shared libraries that tests compile from C++. They are kept in build/fakes until a source, a flag or the compiler
changes: compiling takes longer than the tests, and a second run of them, on another torch say, needs the same ones."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "fakes"


def compile_library(name: str, sources: list[Path], flags: list[str]) -> Path:
    """The library of these sources, which may include what lies beside the first of them and all of csrc.

    $CXXFLAGS come last: those of the sanitizers, in tools/sanitize.sh.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    here = sources[0].parent
    more = os.environ.get("CXXFLAGS", "").split()
    command = [compiler, *flags, "-shared", "-fPIC", f"-I{here}", f"-I{ROOT / 'csrc'}", *more, *map(str, sources)]
    command += ["-lstdc++"]  # which a compiler called gcc leaves out
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # is not the compiler's
    kind = f"{name}-{hashlib.sha256(' '.join(command).encode()).hexdigest()[:8]}"
    digest = hashlib.sha256(subprocess.run([compiler, "--version"], capture_output=True, env=environment).stdout)
    for path in sorted([*here.glob("*.*"), *(ROOT / "csrc").rglob("*.*")]):
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    library = KEPT / f"{kind}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
            made = Path(scratch) / library.name
            result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, env=environment)
            assert result.returncode == 0, result.stderr
            for stale in KEPT.glob(f"{kind}-*.so"):
                stale.unlink(missing_ok=True)
            os.replace(made, library)  # at once, so that a process beside this one finds all of it or nothing
    return library
