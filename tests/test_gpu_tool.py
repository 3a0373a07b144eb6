"""tools/gpu.py, without a GPU: what it says where none answers, and that a failing part ends nothing."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu

ROOT = Path(__file__).parents[1]
CARD = {"name": "a card", "architecture": "90", "torch": "2.11", "absent": ["bitsandbytes"]}


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The tool with a card, and parts made of Python one-liners: tool(name=code, ...)."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "build" / "gpu")
    monkeypatch.setattr(gpu, "ask", lambda: CARD)

    def run(arguments=(), limit_s=60, **codes):
        made = [gpu.Part(name, [sys.executable, "-c", code], limit_s) for name, code in codes.items()]
        monkeypatch.setattr(gpu, "parts", lambda architecture, quick: made)
        return gpu.main(arguments)

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line():
    result = subprocess.run([sys.executable, ROOT / "tools/gpu.py", "--quick"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("gpu: a CUDA device must answer torch, got none")
    assert result.stderr.count("\n") == 1


def test_a_failing_part_ends_nothing(tool, tmp_path, capfd):
    hang = "import time; print('soon', flush=True); time.sleep(60)"
    assert tool(limit_s=2, build="raise SystemExit(3)", bench=hang, table="print('written')") == 1
    said = capfd.readouterr().out
    assert "absent: bitsandbytes" in said
    assert "needed" not in said
    summary = [line.split(None, 2) for line in said.splitlines()[-3:]]
    assert [(name, outcome) for name, _, outcome in summary] == [
        ("build", "failed: exit code 3"), ("bench", "failed: stopped after 2 s"), ("table", "passed"),
    ]  # fmt: skip
    assert (tmp_path / "build/gpu/table.log").read_text() == "written\n"


def test_what_a_part_starts_ends_with_it(tool, capfd):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    assert tool(limit_s=1, memcheck=child) == 1
    assert "stopped after 1 s" in capfd.readouterr().out
    assert time.monotonic() - start < 30  # the grandchild, which holds the pipe, would keep it open for 60


def test_parts_are_told_the_card_and_that_skips_are_forbidden(tool, capfd):
    code = "import os; print(*(os.environ['NF4LORA_' + n] for n in ('CUDA_ARCHS', 'CUDA', 'REQUIRE_CUDA')))"
    assert tool(build=code) == 0
    assert "90a-real ON 1" in capfd.readouterr().out


def test_some_parts_only(tool, capfd):
    assert tool(["table"], build="raise SystemExit(3)", table="pass") == 0
    with pytest.raises(SystemExit):
        tool(["tabel"], table="pass")
    assert "part must be one of table, got tabel" in capfd.readouterr().err


def test_a_program_that_is_not_there_is_named(tool, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "parts", lambda *_: [gpu.Part("memcheck", ["no-such-sanitizer"], 5)])
    assert gpu.main([]) == 1
    assert "failed: no-such-sanitizer is not there" in capfd.readouterr().out


def test_a_skipped_test_fails_the_part(tool, tmp_path, capfd):
    test = tmp_path / "test_some.py"
    test.write_text(
        "import pytest\n"
        "def test_rival(): pytest.importorskip('trl', reason='trl is not installed')\n"
        "def test_card(): pytest.skip('no room')\n"
    )
    report = tmp_path / "build/gpu/tests.xml"
    code = f"import pytest; raise SystemExit(pytest.main(['-q', {str(test)!r}, '--junitxml={report}']))"
    assert tool(tests=code) == 1
    assert "failed: 1 tests skipped, the first because" in capfd.readouterr().out


def test_what_is_tuned_is_used_from_then_on(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    source, installed = tmp_path / "python" / gpu.HEURISTICS, tmp_path / "site" / gpu.HEURISTICS
    for path in (source, installed):
        path.parent.mkdir(parents=True)
        path.write_text("predicted")
    write = f"from pathlib import Path; Path({str(source)!r}).write_text('measured')"
    assert tool(tune=f"{write}; raise SystemExit(1)") == 1
    assert installed.read_text() == "predicted"
    assert tool(tune=write) == 0
    assert installed.read_text() == "measured"


def test_tuning_comes_before_measuring_and_not_from_tiny_sizes():
    names = [part.name for part in gpu.parts("80", False)]
    assert names.index("build") < names.index("tune") < names.index("bench")
    assert "tune" not in [part.name for part in gpu.parts("80", True)]


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_the_sanitizers_see_every_kernel(quick):
    (part,) = (part for part in gpu.parts("80", quick) if part.name == "memcheck")
    words = list(part.command)
    command = [sys.executable, *words[words.index("-m") :], "--collect-only"]
    chosen = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for test in ("test_nf4.py", "test_absmax.py", "test_lora.py::test_every_kernel_of_a_card"):
        assert f"tests/{test}" in chosen, chosen


def test_every_part_names_files_that_exist():
    for quick in (False, True):
        found = gpu.parts("80", quick)
        assert len({part.name for part in found}) == len(found) >= 6
        for part in found:
            assert all((ROOT / word).is_file() for word in part.command if word.startswith("tests/"))
