"""The resource gate of tools/ptxas_gate.py: it reads ptxas, and fails where a kernel grew or spills."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

import ptxas_gate as gate

from support.ptx import compile_ptx

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
needs_binutils = pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not on PATH")

LOG = """\
ptxas info    : 128 bytes gmem
ptxas info    : Compiling entry function '_ZN7nf4lora4cuda1kIfEEvPf' for 'sm_90a'
ptxas info    : Function properties for _ZN7nf4lora4cuda1kIfEEvPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 128 bytes smem, 397 bytes cmem[0]
ptxas info    : Compiling entry function 'plain_kernel' for 'sm_80'
ptxas info    : Function properties for plain_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 352 bytes cmem[0]
"""
USAGE = """\
Fatbin ptx code:
================
arch = sm_80

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:1088 CONSTANT[4]:16
 Function _ZN7nf4lora4cuda1kIfEEvPf:
  REG:31 STACK:8 SHARED:1152 LOCAL:4 CONSTANT[0]:385 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z12plain_kernelPf:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LEAN = {"stack": 0, "spill_stores": 0, "spill_loads": 0, "registers": 31, "shared": 128}


def table(**changes):
    return {"k": {"80": {**LEAN, **changes}}}


@needs_binutils
def test_log_is_read():
    assert gate.read_log(LOG.replace("plain_kernel", "_Z12plain_kernelPf")) == {
        "k<float>": {"90a": {"stack": 16, "spill_stores": 8, "spill_loads": 12, "registers": 31, "shared": 128}},
        "plain_kernel": {"80": {"stack": 0, "spill_stores": 0, "spill_loads": 0, "registers": 8, "shared": 0}},
    }


@needs_binutils
def test_resources_of_machine_code_are_read():
    assert gate.read_resources(USAGE) == {
        "k<float>": {"90a": {"stack": 12, "registers": 31, "shared": 128}},
        "plain_kernel": {"90a": {"stack": 0, "registers": 8, "shared": 0}},
    }


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel, and a cuobjdump that says USAGE of the module in it."""
    said = "#!/bin/sh\ntest $1 = -res-usage && test `cat $2` = module && cat << end\n" + USAGE + "end\n"
    for name, text in (("cuobjdump", said), ("nvdisasm", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "nf4lora-1-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nf4lora/_C.abi.so", "module")
    return path


@needs_binutils
def test_a_wheel_is_held_against_the_table(wheel, tmp_path, monkeypatch, capsys):
    costs = gate.read_resources(USAGE)
    costs["k<float>"]["90a"]["stack"] = 0
    monkeypatch.setattr(gate, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(gate, "nvcc_version", lambda: "13.0")
    monkeypatch.setattr(gate, "architectures", lambda: ["80", "90a"])
    gate.TABLE.write_text(gate.table_text("13.0", costs))
    assert gate.main(["--wheel", str(wheel)]) == 1
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "ptxas_gate: sm_80: not compiled for it",
        "ptxas_gate: k<float> on 90a: 12 bytes of stack, must be 0",
    ]
    with pytest.raises(SystemExit):
        gate.main(["--wheel", str(wheel), "--write"])


def test_same_costs_pass():
    assert gate.compare(table(), table(), same_compiler=True) == []
    assert gate.compare(table(registers=20), table(), same_compiler=True) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": 32}, "k on 80: registers grew from 31 to 32"),
        ({"shared": 256}, "k on 80: shared grew from 128 to 256"),
        ({"spill_loads": 4}, "k on 80: 4 bytes of spill_loads, must be 0"),
        ({"stack": 8}, "k on 80: 8 bytes of stack, must be 0"),
    ],
)
def test_growth_and_local_memory_fail(changes, message):
    assert gate.compare(table(**changes), table(), same_compiler=True) == [message]


def test_local_memory_fails_even_where_the_table_has_it():
    assert gate.compare(table(stack=8), table(stack=8), same_compiler=True)


def test_another_compiler_is_only_asked_for_local_memory():
    assert gate.compare(table(registers=99), table(), same_compiler=False) == []
    assert gate.compare(table(stack=8), table(), same_compiler=False)


def test_new_and_vanished_kernels_fail():
    assert gate.compare(table(), {}, same_compiler=True) == ["k on 80: not in the table"]
    assert gate.compare({}, table(), same_compiler=True) == ["k: in the table, but not in the sources"]


def test_table_text_is_json_that_reads_back():
    assert json.loads(gate.table_text("13.0", table())) == {"nvcc": "13.0", "kernels": table()}


def test_short_names():
    name = "void nf4lora::cuda::(anonymous namespace)::nf4_quantize_kernel<__half>(__half const*, bool)"
    assert gate.short_name(name) == "nf4_quantize_kernel<__half>"
    assert gate.short_name("nf4lora::cuda::(anonymous namespace)::k(float const*)") == "k"


@needs_nvcc
@needs_binutils
def test_table_knows_the_kernels_that_are_there():
    """By name; `make gate` holds what they cost against it."""
    sources = sorted((gate.ROOT / "csrc" / "cuda").glob("*.cu"))
    mangled = [name for each in sources for name in re.findall(r"\.entry (\w+)\(", compile_ptx(each, "80"))]
    assert set(gate.short_names(mangled)) == json.loads(gate.TABLE.read_text())["kernels"].keys()


def test_objects_are_of_the_sources_that_are_there(tmp_path, monkeypatch):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "k.cu").touch()
    objects = tmp_path / "objects"
    objects.mkdir()
    (objects / "of_a_source_now_gone.o").touch()

    def nvcc(command, **_):
        Path(command[-1]).touch()
        return gate.subprocess.CompletedProcess(command, 0, stdout="", stderr="said by ptxas\n")

    monkeypatch.setattr(gate, "ROOT", tmp_path)
    monkeypatch.setattr(gate.subprocess, "run", nvcc)
    assert gate.compile_objects(["80"], objects) == "said by ptxas\n"
    assert [path.name for path in objects.iterdir()] == ["k.o"]
