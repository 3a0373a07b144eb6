"""Which files of CUDA tests belong to what changed since a commit: a short run on a card does without the others.

A file belongs to the tests whose name has the first word of its own (csrc/cuda/lora_gemm.cu: lora), as one concept has
one name everywhere.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

ON_A_CARD = re.compile(r"mark\.gpu|def test_\w+\([^)]*\bdevice\b|@pytest\.fixture\ndef \w+\([^)]*\bdevice\b")
KERNELS = ("csrc/", "python/nf4lora/ops/", "tests/support/", "tests/conftest.py", "CMakeLists.txt")


def tests(root: Path, commit: str | None) -> list[str]:
    """Paths of test files; none where the commit is unknown, or where a file changed that every kernel depends on: then
    all CUDA tests are to be run."""
    changed = changes(root, commit)
    if not changed:
        return []
    every, chosen = on_a_card(root), set()
    for name in changed:
        own = {path for path in every if path == name or concept(name) in Path(path).stem.split("_")[1:]}
        if not own and name.startswith(KERNELS):
            return []
        if name.startswith((*KERNELS, "python/", "tests/test_")):
            chosen |= own
    return sorted(chosen)


def on_a_card(root: Path) -> list[str]:
    """Paths of all test files with CUDA tests, so that the others need not be imported to find none in them."""
    files = sorted((root / "tests").glob("test_*.py"))
    return [str(path.relative_to(root)) for path in files if ON_A_CARD.search(path.read_text())]


def concept(name: str) -> str:
    """
    >>> concept("csrc/cuda/lora_gemm.cu"), concept("python/nf4lora/ops/nf4.py")
    ('lora', 'nf4')
    """
    return Path(name).stem.removeprefix("test_").split("_")[0]


def changes(root: Path, commit: str | None) -> list[str]:
    """Files that changed since the commit, those not committed yet included; none where git cannot tell."""

    def git(*words: str) -> list[str]:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.split()

    if commit is None:
        return []
    try:
        return [*git("diff", "--name-only", commit, "--"), *git("ls-files", "--others", "--exclude-standard")]
    except (OSError, subprocess.CalledProcessError):
        return []


def last_commit(root: Path, device: str) -> str | None:
    """The commit that the kept results of a device were measured at; None without any."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")  # as bench/harness/machine.py names the file
    try:
        cases = json.loads((root / "bench" / "results" / f"{name}.json").read_text())["cases"]
    except FileNotFoundError:
        return None
    record = cases.get("lora") or next(iter(cases.values()), None)
    commit = record and record["environment"]["commit"]
    return commit.rstrip("+") if commit else None
