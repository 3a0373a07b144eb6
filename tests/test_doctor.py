"""nf4lora doctor: what was loaded, what was not, why, and the line that mends it."""

import os
import subprocess
import sys

import pytest
import torch

import nf4lora
from nf4lora import _C, doctor

CARD = {"name": "NVIDIA T", "capability": "9.0"}


def info(**change):
    return {**nf4lora.build_info(), "cuda_devices": [], **change}


def words(**change):
    return list(doctor.findings(info(**change)))


def said(found, text):
    return next(f for f in found if text in f.what)


def test_build_info_tells_what_runs():
    got = nf4lora.build_info()
    assert got["torch"] == torch.__version__ and got["version"] == nf4lora.__version__
    assert got["cpu"] in got["cpu_available"] == _C.cpu_instruction_sets()
    assert got["threads"] == torch.get_num_threads()


def test_a_card_without_kernels_is_a_problem_with_a_cure():
    found = said(words(cuda_torch="13.0", cuda_built=None, cuda_devices=[CARD]), "built without CUDA")
    assert found.broken and "pip install --force-reinstall" in found.cure


def test_an_old_card_is_named():
    old = {"name": "Tesla T4", "capability": "7.5"}
    found = said(words(cuda_torch="13.0", cuda_built="13.0", cuda_archs="80-real", cuda_devices=[old]), "Tesla T4")
    assert found.broken and "8.0 (Ampere)" in found.what


def test_a_card_that_works_is_named_without_cure():
    found = said(words(cuda_torch="13.0", cuda_built="13.0", cuda_archs="80-real", cuda_devices=[CARD]), "NVIDIA T")
    assert not found.broken and not found.cure


def test_torch_that_sees_no_card():
    found = said(words(cuda_torch="13.0"), "sees no device")
    assert not found.broken and "nvidia-smi" in found.cure


def test_held_back_kernels_are_said():
    found = said(words(cpu="scalar", cpu_available=["scalar", "avx2"]), "CPU kernels")
    assert "NF4LORA_CPU holds it below avx2" in found.what and found.cure == "unset NF4LORA_CPU"


def test_missing_package(monkeypatch):
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", ("nothing", "pip install no-such-package"))
    found = said(words(), "no-such-package is missing")
    assert found.cure == "pip install no-such-package" and not found.broken


def command(environment):
    code = "import sys; from nf4lora.cli import main; sys.exit(main(['doctor']))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_a_peft_that_transformers_refuses_is_named(monkeypatch):
    from transformers.integrations import peft

    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "99.0")
    (found,) = [each for each in doctor.findings(nf4lora.build_info()) if "add_adapter" in each.what]
    assert "prepare and PEFT itself work" in found.what and "peft>=99.0" in found.cure and not found.broken
    monkeypatch.setattr(peft, "MIN_PEFT_VERSION", "0.1")
    assert not [each for each in doctor.findings(nf4lora.build_info()) if "add_adapter" in each.what]


def test_command_prints_and_succeeds():
    done = command({})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"nf4lora {nf4lora.__version__}" in done.stdout and "CPU kernels" in done.stdout


def test_instruction_set_can_be_chosen_by_environment():
    assert "CPU kernels: scalar" in command({"NF4LORA_CPU": "scalar"}).stdout


def test_unknown_instruction_set_is_an_error_with_the_choices():
    code = "import torch, nf4lora; nf4lora.ops.nf4_quantize(torch.ones(64))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "NF4LORA_CPU": "sse9"}
    )
    assert "ValueError: NF4LORA_CPU: instruction set must be one of scalar, " in done.stderr


def test_forcing_what_the_processor_lacks_is_an_error():
    for name in ("scalar", "avx2", "avx512", "avx512bf16"):
        if name not in _C.cpu_instruction_sets():
            with pytest.raises(ValueError, match=f"this processor has no {name}"):
                _C.force_cpu_instruction_set(name)
    with pytest.raises(ValueError, match="must be one of"):
        _C.force_cpu_instruction_set("neon")
