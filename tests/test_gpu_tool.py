"""tools/gpu.py, without a GPU: what it says where none answers, and that a failing part ends nothing."""

import doctest
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu
import touched
import two_calls
from bench.harness.machine import file_name
from nf4lora.ops.kernels import dispatch

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


# ---- with a budget ----


@pytest.fixture
def lent(tmp_path, monkeypatch):
    """The tool with a card for some minutes, and parts made of Python one-liners: lent(minutes, name=code, ...)."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "build" / "gpu")
    monkeypatch.setattr(gpu, "ask", lambda: CARD)

    def run(minutes, limit_s=60, **codes):
        made = [gpu.Part(name, [sys.executable, "-c", code, gpu.SECONDS], limit_s) for name, code in codes.items()]
        monkeypatch.setattr(gpu, "budgeted", lambda card, options: made)
        return gpu.main(["--minutes", str(minutes)])

    return run


def summary(tmp_path):
    return json.loads((tmp_path / "build/gpu/summary.json").read_text())


def test_a_budget_that_is_spent_begins_no_part_and_names_those_left(lent, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "LEAST_S", 2)
    assert lent(3 / 60, build="pass", doctor="import time; time.sleep(1.5)", saturated="pass", overhead="pass") == 0
    said = capfd.readouterr().out
    assert said.splitlines()[-1] == "left out: saturated, overhead"
    assert [line.split()[0] for line in said.splitlines()[-3:-1]] == ["build", "doctor"]
    assert [part["part"] for part in summary(tmp_path)["begun"]] == ["build", "doctor"]
    assert summary(tmp_path)["rest"] == ["saturated", "overhead"]


def test_no_part_outlives_the_budget(lent, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "LEAST_S", 1)
    start = time.monotonic()
    assert lent(3 / 60, saturated="import time; time.sleep(60)") == 1
    assert time.monotonic() - start < 10
    assert re.search("failed: stopped after [12] s", capfd.readouterr().out)


def test_each_part_is_written_down_before_the_next_begins(lent, tmp_path, capfd):
    look = "from pathlib import Path; print(Path('build/gpu/summary.json').read_text())"
    assert lent(1, build="print('built')", tests="raise SystemExit(2)", overhead=look) == 1
    seen = json.loads((tmp_path / "build/gpu/overhead.log").read_text())
    assert [(part["part"], part["outcome"]) for part in seen["begun"]] == [
        ("build", "passed"), ("tests", "failed: exit code 2"),
    ]  # fmt: skip
    assert seen["rest"] == ["overhead"]
    assert "left out" not in capfd.readouterr().out


def test_nothing_follows_a_build_that_failed(lent, capfd):
    assert lent(1, build="raise SystemExit(1)", tests="print('ran')") == 1
    said = capfd.readouterr().out
    assert "ran\n" not in said
    assert said.splitlines()[-1] == "left out: tests"


def test_a_benchmark_is_told_what_is_left():
    part = gpu.Part("saturated", ["bench", "--seconds", gpu.SECONDS], 150)
    assert part.within(1000).command == ["bench", "--seconds", "130"]
    assert part.within(1000).limit_s == 150
    assert part.within(60.5).command == ["bench", "--seconds", "40"]
    assert part.within(60.5).limit_s == 60
    assert part.within(11).command == ["bench", "--seconds", "20"]


def budgeted(*arguments, card=CARD):
    return {part.name: part for part in gpu.budgeted(card, gpu.parse(["--minutes", "5", *arguments]))}


def test_parts_of_a_budget_come_in_the_order_in_which_they_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PROBES", tmp_path)
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: f"/bin/{tool}")
    (tmp_path / "rates.cu").write_text("")
    (tmp_path / "wgmma loop.cu").write_text("")
    assert list(budgeted()) == [
        "build", "tests", "saturated", "overhead", "probe-rates", "probe-wgmma loop", "ncu",
    ]  # fmt: skip
    assert list(budgeted("--tune"))[-1] == "tune"
    assert list(budgeted("step", "build", "probes")) == ["build", "probe-rates", "probe-wgmma loop", "step"]
    assert list(budgeted("memcheck")) == ["memcheck"]
    compiled = budgeted()["probe-wgmma loop"].command[-1]
    assert compiled.startswith("nvcc -O3 -std=c++17 -arch=sm_90a -o ")
    assert f"'{tmp_path / 'wgmma loop.cu'}' && exec '" in compiled
    monkeypatch.setattr(gpu.shutil, "which", lambda tool: None)
    assert "ncu" not in budgeted()


def test_a_probe_is_compiled_and_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    nvcc = tmp_path / "nvcc"  # stands for a compiler: the program that it writes says what it was compiled from
    nvcc.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nprintf "echo ran $3" > "$2"; chmod +x "$2"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    part = gpu.Part("probe-x", gpu.probe(tmp_path / "x.cu", "90"), 20)
    assert gpu.run(part, "90")[1] == "passed"
    assert f"ran {tmp_path / 'x.cu'}" in capfd.readouterr().out


def test_a_wheel_is_installed_in_place_of_a_build(tmp_path, capsys):
    wheel = tmp_path / "nf4lora.whl"
    wheel.write_text("")
    command = budgeted("--wheel", str(wheel))["build"].command
    assert command[-1] == str(wheel)
    assert command[-3:-1] == ["--target", str(gpu.SITE)]
    assert "--no-deps" in command
    assert budgeted()["build"].command[-1] == "."
    for wrong, said in (
        (["--wheel", str(wheel)], "--wheel and --tune must come with --minutes"),
        (["--tune"], "--wheel and --tune must come with --minutes"),
        (["--minutes", "5", "--wheel", str(tmp_path / "none.whl")], "--wheel must name a file, got"),
        (["--minutes", "5", "tabel"], "part must be one of build, tests, saturated, overhead, probes, ncu, step, tune"),
    ):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)
        assert said in capsys.readouterr().err


def test_what_a_budget_measures_is_what_bench_understands():
    from bench import __main__

    for name in ("saturated", "overhead", "step", "tune"):
        words = budgeted(name, "--quick")[name] if name != "tune" else budgeted(name)[name]
        words = [word.replace(gpu.SECONDS, "30") for word in words.command]
        options = __main__.parse(words[words.index("bench") + 1 :])
        assert options.device == "cuda"
        assert options.case == [{"saturated": "lora"}.get(name, name)]
        assert options.quick == (name != "tune")
        assert options.seconds == (30 if name in ("saturated", "step") else None)
        assert list(options.clocks) == (["saturated"] if name == "saturated" else ["saturated", "in_a_row", "alone"])


# ---- what changed ----


@pytest.fixture
def repository(tmp_path):
    """A repository with a commit; change(path) writes into it. Its tests are those of this one."""

    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def change(path):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"changed {path}")

    (tmp_path / "tests").mkdir()
    for path in (ROOT / "tests").glob("test_*.py"):
        (tmp_path / "tests" / path.name).write_text(path.read_text())
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    change.commit = git("rev-parse", "--short", "HEAD")
    change.git = git
    return change


@pytest.mark.slow
def test_files_with_cuda_tests_are_found_without_importing_them():
    # Collecting everything takes a minute: only files with the mark or a function that has a `device` can have one.
    able = re.compile(r"[(, ]device\b.*\):|mark\.gpu|usefixtures\(.*device")
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if able.search(path.read_text())]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", *files]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted({line.split("::")[0] for line in said.splitlines() if "::" in line}) == touched.on_a_card(ROOT)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["csrc/cuda/nf4.cu"], ["tests/test_nf4.py"]),
        (
            ["csrc/cuda/lora_gemm.cu"],
            [f"tests/test_lora{name}.py" for name in ("", "_dense", "_group", "_kernels", "_limits")],
        ),
        (["python/nf4lora/ops/absmax.py", "README.md"], ["tests/test_absmax.py"]),
        (["csrc/cuda/nf4.cu", "csrc/cuda/launch.h"], []),  # all: every kernel is launched so
        (["python/nf4lora/nn/linear.py"], ["tests/test_linear.py"]),
        (["docs/lora.md", "python/nf4lora/train/fit.py", "tests/test_train_run.py"], []),
        ([], []),
    ],
)
def test_tests_are_those_of_what_changed(repository, tmp_path, changed, expected):
    for path in changed:
        repository(path)
    assert touched.tests(tmp_path, repository.commit) == expected  # not committed
    if changed:
        repository.git("add", "-A")
        repository.git("commit", "-qm", "more")
    assert touched.tests(tmp_path, repository.commit) == expected
    assert touched.tests(tmp_path, None) == touched.tests(tmp_path, "0000000") == []


def test_commit_of_the_last_results(tmp_path, monkeypatch):
    device = "NVIDIA H200"
    assert touched.last_commit(tmp_path, device) is None
    path = tmp_path / "bench/results" / file_name({"device": device, "cuda": "13.0"})
    path.parent.mkdir(parents=True)
    record = {"environment": {"commit": "abc"}}
    path.write_text(json.dumps({"cases": {"nf4": record, "lora": {"environment": {"commit": "def+"}}}}))
    assert touched.last_commit(tmp_path, device) == "def"
    path.write_text(json.dumps({"cases": {"nf4": record}}))
    assert touched.last_commit(tmp_path, device) == "abc"
    monkeypatch.setattr(gpu.touched, "tests", lambda root, commit: [f"tests/of-{commit}.py"])
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.touched, "on_a_card", lambda root: ["tests/all.py"])
    assert budgeted(card=CARD | {"name": "another"})["tests"].command[-1] == "tests/of-None.py"
    assert budgeted(card=CARD | {"name": device})["tests"].command[-1] == "tests/of-abc.py"


def test_a_profiler_sees_one_call_of_each_of_two_kernels(monkeypatch, capsys):
    seen = []
    plain = two_calls.ops.lora_linear
    monkeypatch.setattr(two_calls.ops, "lora_linear", lambda *a, **k: seen.append(dispatch.forced()) or plain(*a, **k))
    assert two_calls.main(["--device", "cpu", "--quick"]) == 0
    kernels = list(dispatch.CHOICES["forward"][-2:])
    assert seen == kernels * 2  # once to warm up
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == kernels


def test_examples_in_docstrings():
    for module in (gpu, touched):
        assert doctest.testmod(module).failed == 0
