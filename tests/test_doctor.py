"""nf4lora doctor: what was loaded, what was not, why, and the line that mends it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nf4lora
from nf4lora import _C
from nf4lora.cli import doctor

CARD = {"name": "NVIDIA T", "capability": "9.0"}


def info(**change):
    return {**nf4lora.build_info(), "cuda_devices": [], **change}


def words(**change):
    return list(doctor.findings(info(**change)))


def said(found, text):
    return next(f for f in found if text in f.what)


def test_build_info_tells_what_runs():
    got = nf4lora.build_info()
    assert got["torch"] == torch.__version__
    assert got["version"] == nf4lora.__version__
    assert got["cpu"] in got["cpu_available"] == _C.cpu_instruction_sets()
    assert got["threads"] == torch.get_num_threads()


def test_a_card_without_kernels_is_a_problem_with_a_cure():
    found = said(words(cuda_torch="13.0", cuda_built=None, cuda_devices=[CARD]), "built without CUDA")
    assert found.broken
    assert "pip install --force-reinstall" in found.cure


def test_a_system_other_than_linux_is_told_first(monkeypatch):
    assert not any("not supported" in finding.what for finding in words())
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    first = words()[0]
    assert first.broken
    assert first.what.startswith("Darwin is not supported")
    assert "macOS" in first.cure


def version_of_cmake():
    said = (
        subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout if shutil.which("cmake") else ""
    )
    found = re.search(r"(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0, 0)


@pytest.mark.skipif(version_of_cmake() < (3, 28), reason="no cmake of version 3.28 or later on PATH")
@pytest.mark.parametrize("system", ["Windows", "Darwin"])
def test_the_build_says_at_once_that_it_needs_linux(system, tmp_path):
    about = [f"-DCMAKE_SYSTEM_NAME={system}", "-DCMAKE_CXX_COMPILER_WORKS=1"]
    command = ["cmake", "-S", str(Path(__file__).parents[1]), "-B", str(tmp_path), *about]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode
    assert f"builds on Linux only, this is {system}" in " ".join(result.stderr.split())


def test_an_old_card_is_named():
    old = {"name": "Tesla T4", "capability": "7.5"}
    found = said(words(cuda_torch="13.0", cuda_built="13.0", cuda_archs="80-real", cuda_devices=[old]), "Tesla T4")
    assert found.broken
    assert "8.0 (Ampere)" in found.what


def test_a_card_that_works_is_named_without_cure():
    archs = "80-real;90a-real;80-virtual"
    found = said(words(cuda_torch="13.0", cuda_built="13.0", cuda_archs=archs, cuda_devices=[CARD]), "NVIDIA T")
    assert not found.broken
    assert not found.cure


def test_a_card_that_the_binary_has_no_code_for_is_a_problem_with_a_cure():
    card = {"cuda_torch": "13.0", "cuda_built": "13.0", "cuda_devices": [CARD]}
    found = said(words(**card, cuda_archs="80-real;86-real"), "NVIDIA T")
    assert found.broken
    assert "runs none of the architectures" in found.what
    assert "80-real 86-real" in found.what
    assert "NF4LORA_CUDA_ARCHS=90-real pip install" in found.cure
    found = said(words(**card, cuda_archs="80-real;80-virtual"), "NVIDIA T")
    assert not found.broken
    assert "the driver compiles the kernels at their first use" in found.what


@pytest.mark.parametrize(
    ("card", "archs", "code"),
    [
        ((8, 0), "80-real", "real"),
        ((8, 9), "80-real", "real"),  # the same major version, a later minor one
        ((8, 0), "86-real", ""),
        ((8, 6), "89-real;80-virtual", "virtual"),
        ((9, 0), "80-real", ""),
        ((9, 0), "90a-real", "real"),
        ((9, 0), "90a-virtual", "virtual"),
        ((10, 3), "100a-real", ""),  # a: this card alone
        ((10, 3), "100f-real", "real"),  # f: its family
        ((12, 0), "80-virtual", "virtual"),
        ((12, 1), "80-real;120a-real;80-virtual", "virtual"),
        ((12, 1), "120a-real", ""),
        ((8, 0), "86-virtual", ""),
        ((8, 6), "86", "real"),
        ((9, 0), "86", "virtual"),
        ((9, 0), "80-real 90-real", "real"),
        ((9, 0), "", ""),
        ((9, 0), "native", ""),
    ],
)
def test_code_for_a_card(card, archs, code):
    assert doctor.code_for(*card, archs) == code


def test_torch_that_sees_no_card():
    found = said(words(cuda_torch="13.0"), "sees no device")
    assert not found.broken
    assert "nvidia-smi" in found.cure


def test_held_back_kernels_are_said():
    found = said(words(cpu="scalar", cpu_available=["scalar", "avx2"]), "CPU kernels")
    assert "NF4LORA_CPU holds it below avx2" in found.what
    assert found.cure == "unset NF4LORA_CPU"


def test_missing_package(monkeypatch):
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", ("nothing", "pip install no-such-package"))
    found = said(words(), "no-such-package is missing")
    assert found.cure == "pip install no-such-package"
    assert not found.broken


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def command(environment, before="pass"):
    code = f"import sys; {before}; from nf4lora.cli.main import main; sys.exit(main(['doctor']))"
    return run_python("-c", code, **environment)


@pytest.fixture
def broken(tmp_path):
    """A function: a folder for PYTHONPATH in which a package of this name fails to be imported."""

    def make(name):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('half\\ninstalled')")
        return os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers", "peft"])
def test_a_package_that_cannot_be_imported_is_a_finding(broken, name):
    done = run_python("-m", "nf4lora", "doctor", PYTHONPATH=broken(name))
    assert done.returncode == 1, done.stderr
    assert f"! {name} cannot be imported: RuntimeError: half installed" in done.stdout
    assert "pip install" in done.stdout
    assert "CPU kernels" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_module_that_does_not_load_is_a_finding_with_a_cure():
    done = command({}, "sys.modules['nf4lora._C'] = None")
    assert done.returncode == 1, done.stderr
    assert f"! the compiled module does not load with torch {torch.__version__}" in done.stdout
    assert "cure: it needs torch 2.11" in done.stdout
    assert "- peft" in done.stdout


def test_torch_that_cannot_be_imported_is_a_finding(broken):
    done = run_python("-m", "nf4lora", "doctor", PYTHONPATH=broken("torch"))
    assert done.returncode == 1, done.stderr
    assert "! torch cannot be imported: RuntimeError: half installed" in done.stdout


@pytest.mark.slow
def test_the_library_says_at_its_first_use_why_it_cannot_be_loaded():
    code = (
        "import sys; sys.modules['nf4lora._C'] = None; import nf4lora\n"
        "for name in ('prepare', '__version__', 'ops'):\n"
        "    try: getattr(nf4lora, name)\n"
        "    except ImportError as error: print(error)"
    )
    lines = run_python("-c", code).stdout.splitlines()
    assert len(lines) == 3
    assert all("the compiled module did not load with torch" in line and "rebuild it" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--version"], 0), (["--help"], 0), (["train", "--help"], 0), (["trian"], 2), (["train", "--bogus", "1"], 2)],
)
def test_what_needs_no_library_imports_none(arguments, code):
    done = run_python("-X", "importtime", "-m", "nf4lora", *arguments)
    assert done.returncode == code
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "nf4lora.cli.main" in imported
    assert not imported & {"torch", "transformers", "peft", "numpy", "nf4lora._C"}


def test_the_version_is_that_of_the_library():
    assert run_python("-m", "nf4lora", "--version").stdout.split()[:2] == ["nf4lora", nf4lora.__version__]


@pytest.mark.slow
def test_names_of_the_package_are_there_in_the_command_line_too():
    code = (
        "import sys; sys.argv = ['/usr/bin/nf4lora']; import nf4lora; print('torch' in sys.modules)\n"
        "from nf4lora import prepare; print(callable(nf4lora.report), callable(prepare))\n"
        "print(nf4lora.nn.__name__, hasattr(nf4lora, 'nothing'), 'prepare' in dir(nf4lora))"
    )
    done = run_python("-c", code)
    assert done.stdout.split() == ["False", "True", "True", "nf4lora.nn", "False", "True"], done.stderr


def test_a_peft_that_transformers_refuses_is_named(monkeypatch):
    from transformers.integrations import peft

    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "99.0")
    (found,) = [each for each in doctor.findings(nf4lora.build_info()) if "add_adapter" in each.what]
    assert "prepare and PEFT itself work" in found.what
    assert "peft>=99.0" in found.cure
    assert not found.broken
    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "0.1")
    assert not [each for each in doctor.findings(nf4lora.build_info()) if "add_adapter" in each.what]


@pytest.mark.slow
def test_command_prints_and_succeeds():
    done = command({})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"nf4lora {nf4lora.__version__}" in done.stdout
    assert "CPU kernels" in done.stdout


@pytest.mark.slow
def test_instruction_set_can_be_chosen_by_environment():
    assert "CPU kernels: scalar" in command({"NF4LORA_CPU": "scalar"}).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("command", "code"), [(["doctor"], 1), (["train", "--model", ".", "--data", "README.md"], 2)])
def test_a_wrong_instruction_set_is_one_sentence(command, code):
    environment = {**os.environ, "NF4LORA_CPU": "sse9"}
    done = subprocess.run([sys.executable, "-m", "nf4lora", *command], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "NF4LORA_CPU: instruction set must be one of scalar" in done.stdout + done.stderr


@pytest.mark.slow
def test_unknown_instruction_set_is_an_error_with_the_choices():
    code = "import torch, nf4lora; nf4lora.ops.nf4_quantize(torch.ones(64))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "NF4LORA_CPU": "sse9"}
    )
    assert "ValueError: NF4LORA_CPU: instruction set must be one of scalar, " in done.stderr


def test_forcing_what_the_processor_lacks_is_an_error():
    for name in ("scalar", "avx2", "avx512", "avx512bf16"):
        if name not in _C.cpu_instruction_sets():  # on another machine than x86 they are unknown
            with pytest.raises(ValueError, match=f"this processor has no {name}|must be one of scalar"):
                _C.force_cpu_instruction_set(name)
    with pytest.raises(ValueError, match="must be one of"):
        _C.force_cpu_instruction_set("mmx")
