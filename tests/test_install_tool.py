"""tools/install.py, status.py and oldest.py: what a newcomer is told while pip works, and which versions are tested."""

import io
import re
import sys
import time
from pathlib import Path

import pytest

import install
import oldest
import status

TOOLS = Path(__file__).parents[1] / "tools"
SLEEP = "import time; print('Collecting torch', flush=True); time.sleep(0.5)"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.alone
def test_long_work_is_told_in_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with status.Status("converting", stream, every=0.05) as tell:
        tell("3 of 12")
        time.sleep(0.3)
    first, *between, last = stream.getvalue().splitlines()
    assert first == "converting"
    assert len(between) >= 2
    assert set(between) == {"  converting: 3 of 12, 0 s"}
    assert last == "converting: done after 0 s"


@pytest.mark.alone
def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch):
    monkeypatch.setattr(status, "REWRITE_S", 0.02)
    stream = Terminal()
    with status.Status("converting", stream) as tell:
        tell("a" * 500)
        time.sleep(0.2)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r\x1b[K") >= 4
    assert max(map(len, stream.getvalue().split("\r\x1b[K"))) < 200  # no line wraps
    assert stream.getvalue().endswith("\r\x1b[Kconverting: done after 0 s\n")


def test_work_that_fails_is_not_said_to_be_done():
    stream = io.StringIO()
    with pytest.raises(KeyError), status.Status("converting", stream):
        raise KeyError("x")
    assert stream.getvalue().splitlines()[-1] == "converting: stopped by KeyError after 0 s"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Collecting torch>=2.11", "looking for torch>=2.11"),
        ("  Downloading torch-2.14.1-cp311-cp311-linux.whl (554.6 MB)", "fetching torch 2.14.1, 554.6 MB"),
        ("Downloading https://host/a/numpy-2.4.6-cp311.whl (16.6 MB)", "fetching numpy 2.4.6, 16.6 MB"),
        ("  Using cached six-1.17.0-py2.py3-none-any.whl (11 kB)", "fetching six 1.17.0, 0.0 MB"),
        ("Installing collected packages: mpmath", "unpacking mpmath"),
        ("Installing collected packages: mpmath, sympy, torch", "unpacking 3 packages"),
        ("  Building wheel for nf4lora (pyproject.toml): started", "building wheel for nf4lora"),
        ("  [3/34] Building CUDA object CMakeFiles/kernels.dir/csrc/cuda/nf4.cu.o", "compiling 3 of 34, nf4.cu"),
        ("  Downloading torch-2.14.1-cp311-cp311-linux.whl.metadata (29 kB)", None),
        ("Requirement already satisfied: numpy", None),
    ],
)
def test_lines_of_pip_become_a_few_words(line, told):
    said, notes = [], []
    install.Reader(said.append, notes.append)(line)
    assert said == ([told] if told else [])
    assert notes == (["torch 2.14.1, 554.6 MB"] if told and "554.6" in told else [])


def test_a_file_of_a_local_index_tells_its_size(tmp_path):
    wheel = tmp_path / "large-1.0-py3-none-any.whl"
    with wheel.open("wb") as file:
        file.truncate(30_000_000)  # takes no room on the disk
    said, notes = [], []
    install.Reader(said.append, notes.append)(f"Processing {wheel} (from other)")
    assert said == ["fetching large 1.0, 30.0 MB"]
    assert notes == ["large 1.0, 30.0 MB"]


@pytest.mark.alone
def test_a_long_download_is_told(capsys):
    assert install.run("installing torch", [sys.executable, "-c", SLEEP], every=0.1) == 0
    text = capsys.readouterr().err
    assert "  installing torch: looking for torch, 0 s\n" in text
    assert "Collecting" not in text


def test_what_pip_said_is_shown_where_it_fails(capsys):
    code = "import sys; print('Collecting torch'); print('ERROR: no such version', file=sys.stderr); sys.exit(3)"
    assert install.run("installing torch", [sys.executable, "-c", code]) == 3
    text = capsys.readouterr().err
    assert re.search(r"installing torch: failed with exit code 3 after \d+ s\n", text)
    assert text.endswith("Collecting torch\nERROR: no such version\n")


# ---- the lowest versions ----

PROJECT = """
[project]
dependencies = ["torch>=2.11", "numpy", "Peft>=0.19,<0.22"]
[project.optional-dependencies]
train = ["trl>=1.16"]
test = ["nf4lora[train]", "pytest"]
lint = ["ruff>=0.1"]
"""


def test_bounds_are_those_of_pyproject(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text(PROJECT)
    assert oldest.bounds(path) == {"torch": "2.11", "peft": "0.19", "trl": "1.16"}
    assert {"torch", "transformers", "peft", "trl"} <= oldest.bounds().keys()


def test_a_bound_that_cannot_be_installed_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(oldest, "bounds", lambda: {"torch": "2.11", "peft": "0.19"})
    monkeypatch.setattr(oldest, "can_be_installed", lambda name, version: name != "torch")
    assert oldest.main(["constraints", str(tmp_path / "new" / "file.txt")]) == 0
    assert (tmp_path / "new" / "file.txt").read_text() == "peft==0.19\n"
    assert "oldest: torch 2.11 cannot be installed here, and is NOT tested\n" in capsys.readouterr().out


def test_a_version_that_is_not_the_bound_is_told(monkeypatch, capsys):
    versions = {"torch": "2.11.0+cpu", "peft": "0.21.2"}
    monkeypatch.setattr(oldest.importlib.metadata, "version", lambda name: versions[name])
    monkeypatch.setattr(oldest, "bounds", lambda: {"torch": "2.11"})
    assert oldest.main(["installed"]) == 0
    monkeypatch.setattr(oldest, "bounds", lambda: {"torch": "2.11", "peft": "0.19"})
    assert oldest.main(["installed"]) == 1
    assert "oldest: peft 0.21.2, NOT the 0.19 that pyproject.toml names\n" in capsys.readouterr().out
