"""The instruction gate of tools/sass_gate.py: it reads machine code, and fails where an instruction is missing."""

import shutil

import pytest

import sass_gate as gate

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
needs_binutils = pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not on PATH")
needs_disassembler = pytest.mark.skipif(gate.machine_code.disassembler() is None, reason="no cuobjdump with nvdisasm")

LISTING = """\
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

\tcode for sm_80
\t\tFunction : _ZN7nf4lora4cuda1kIfEEvPf
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   HMMA.16816.F32 R8, R16, R28, R8 ;      /* 0x0000001c1008723c */
                                                                          /* 0x044fe20000001808 */
        /*0010*/              @!P0 LDG.E.NA.128.CONSTANT R4, [R2.64] ;    /* 0x0000000402048981 */
        /*0020*/              @UP1 LDG.E.64.CONSTANT R4, [R2.64] ;        /* 0x0000000402048981 */
        /*10030*/              @P2 LDGSTS.E.BYPASS.128 [R4], [R2.64] ;    /* 0x0000000402048981 */
arch = sm_90a
\tcode for sm_90a
\t\tFunction : _ZN7nf4lora4cuda1kIfEEvPf
        /*0000*/                   STL.64 [R1], R2 ;                      /* 0x0000000201007387 */
        /*0010*/                   LDL.LU R2, [R1] ;                      /* 0x0000000001027983 */
        /*0020*/                   LDL R3, [R1+0x4] ;                     /* 0x0000040001037983 */
"""
DEMANDS = {"k": {"HMMA": "products are made by tensor cores", "LDG.E.128": "W is streamed"}}
GOOD = {"HMMA": 1, "LDG.E.128": 4}


def counts(**changes):
    return {"k<float>": {"80": gate.Counter(GOOD | changes)}}


@needs_binutils
def test_listing_is_read():
    assert gate.read_listing(LISTING) == {
        "k<float>": {"80": {"HMMA": 1, "LDG.E.128": 1, "LDGSTS": 1}, "90a": {"STL": 1, "LDL": 2}}
    }


@needs_binutils
def test_each_thing_that_is_wrong_in_a_listing_is_named():
    assert gate.compare(gate.read_listing(LISTING), DEMANDS, ["80", "90a"]) == [
        "k<float> on 90a: 2 LDL, must be 0: local memory",
        "k<float> on 90a: 1 STL, must be 0: local memory",
        "k<float> on 90a: no HMMA, but products are made by tensor cores",
        "k<float> on 90a: no LDG.E.128, but W is streamed",
    ]


def test_what_is_demanded_passes():
    assert gate.compare(counts(), DEMANDS, ["80"]) == []
    assert gate.compare(counts(PRMT=7), DEMANDS, ["80"]) == []


@pytest.mark.parametrize("name", sorted(GOOD))
def test_missing_instruction_fails(name):
    assert gate.compare(counts(**{name: 0}), DEMANDS, ["80"]) == [
        f"k<float> on 80: no {name}, but {DEMANDS['k'][name]}"
    ]


@pytest.mark.parametrize("name", ["LDL", "STL"])
def test_local_memory_fails_in_a_kernel_of_which_nothing_is_demanded(name):
    assert gate.compare(counts(**{name: 3}), {}, ["80"]) == [f"k<float> on 80: 3 {name}, must be 0: local memory"]


def test_kernels_and_architectures_that_are_not_there_fail():
    assert gate.compare({}, DEMANDS, ["80"]) == ["k: demanded, but not in the sources"]
    assert gate.compare(counts(), DEMANDS, ["80", "90a"]) == ["k<float> on 90a: not in the machine code"]


def test_demand_on_a_kernel_is_not_one_on_its_namesakes():
    namesake = {"k_sum<float>": {"80": gate.Counter()}}
    assert gate.compare(counts() | namesake, DEMANDS, ["80"]) == []


def test_every_demand_is_counted():
    assert all(needed.keys() <= set(gate.COUNTED) for needed in gate.DEMANDS.values())


def test_cache_hints_do_not_hide_a_wide_load():
    assert gate.is_a("LDG.E.NA.128.CONSTANT", "LDG.E.128")
    assert not gate.is_a("LDG.E.64.CONSTANT", "LDG.E.128")
    assert not gate.is_a("LDGSTS.E.BYPASS.128", "LDG.E.128")


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["--require"], 1)])
def test_without_a_disassembler_it_says_so(arguments, status, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gate.machine_code.sysconfig, "get_path", lambda name: str(tmp_path))
    assert gate.main(arguments) == status
    assert capsys.readouterr().out == "sass_gate: no cuobjdump with nvdisasm on PATH or in this Python: not counted\n"


@pytest.mark.slow
@needs_nvcc
@needs_disassembler
def test_kernels_hold_what_is_demanded(tmp_path):
    gate.ptxas_gate.compile_objects(["80"], tmp_path)
    assert gate.compare(gate.counts_of(tmp_path), gate.DEMANDS, ["80"]) == []
