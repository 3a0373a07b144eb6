""".ci/run with a make that does nothing: it ends with 0 where every step does, and fails where any of them fails."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / ".ci" / "run"
MAKE = """#!/bin/sh
echo "made $*"
mkdir -p .venv/wheel && touch .venv/wheel/some.whl
case "$*" in *"$FAILS"*) exit 2;; esac
"""

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="no .ci/run outside a checkout")


def run(folder, fails):
    (folder / ".ci").mkdir()
    shutil.copy(RUN, folder / ".ci" / "run")
    absent = "#!/bin/sh\nexit 1\n"  # nothing is installed, which is no failure
    for name, text in (("make", MAKE), ("nvcc", "#!/bin/sh\n"), ("apt-get", absent)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "FAILS": fails}
    return subprocess.run([folder / ".ci" / "run"], env=environment, capture_output=True, text=True)


def test_all_steps_are_done(tmp_path):
    done = run(tmp_path, "no step")
    assert done.returncode == 0, done.stderr
    assert "== done" in done.stdout
    for step in ("lint", ".venv/wheel", "test ARGS", "instrumented", "test TORCH", "gate", "sanitize"):
        assert f"made {step}" in done.stdout


@pytest.mark.parametrize(
    "step", ["lint", ".venv/wheel", "test ARGS", "instrumented", "test TORCH", "gate TORCH", "sanitize TORCH"]
)
def test_a_step_that_fails_ends_it(tmp_path, step):
    done = run(tmp_path, step)
    assert done.returncode == 2
    assert "== done" not in done.stdout
