"""The dependency floors, of Python and of C++: a file uses only what stands below it."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python/nf4lora"
CSRC = ROOT / "csrc"

# ops, layers, quantizer and adapter, prepare, train and the command line: each line may use the lines above it.
FLOORS = [
    {"_C", "whole_files"},
    {"unfused", "choice", "heap", "moments", "paged", "processor"},
    {"sliced", "shards", "unified"},
    {"cuda"},
    {"ops", "packed_weight"},
    {"linear", "doctor", "region", "weight_readers", "task", "cross_entropy"},
    {"config", "model_tree", "optim", "deferred_logits"},
    {"new_weights"},
    {"bitsandbytes", "adapter", "base_identity", "checkpoint", "renaming", "quantized_checkpoint", "trl_head"},
    {"adapter_folder"},
    {"adapter_files", "loss"},
    {"quantizer", "report", "targets"},
    {"pack", "rehearsal"},
    {"plan"},
    {"prepare"},
    {"train"},
    {"cli", "bench"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = sorted(p for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__", "reference"))


def imports(path):
    """Modules of the package that a file names, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "nf4lora":
            yield from (alias.name for alias in node.names if alias.name in FLOOR or alias.name == "reference")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nf4lora."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("nf4lora."))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_down(path):
    assert path.stem in FLOOR, f"{path.name} stands on no floor: add it to FLOORS"
    for name in imports(path):
        assert name != "reference", f"{path.name} imports the reference; only tests and bench may"
        assert FLOOR[name] < FLOOR[path.stem], f"{path.name} must not import {name}"


def test_train_does_not_reach_up():
    for path in (PACKAGE / "train").glob("*.py"):
        assert not {"cli", "bench", "reference"} & set(imports(path)), path.name


def includes(path):
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_format_knows_neither_torch_nor_cuda():
    assert includes(CSRC / "format.h") == ["cstdint"]


def test_loops_know_no_torch():
    # Nor the standard library's templates, of which the linker could keep the copy of the wrong instruction set.
    allowed = {"cstdint", "cstring", "immintrin.h"}
    for path in (CSRC / "cpu/isa").iterdir():
        names = set(includes(path))
        assert all(n in allowed or (CSRC / "cpu/isa" / n).exists() for n in names), f"{path.name}: {names}"


def test_cpu_and_cuda_never_include_each_other():
    for path in (CSRC / "cpu").rglob("*.*"):
        assert not any("cuda" in name for name in includes(path)), path.name
    for path in (CSRC / "cuda").iterdir():
        assert not any(name.startswith(("cpu/", "../cpu")) for name in includes(path)), path.name


def test_kernels_know_no_torch():
    for path in [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cuh"), CSRC / "cuda/launch.h"]:
        assert not any(name.startswith(("torch", "pybind11")) for name in includes(path)), path.name


def test_files_stay_short():
    files = [p for p in [*PACKAGE.rglob("*.py"), *CSRC.rglob("*.*"), *(ROOT / "bench").rglob("*.py")] if p.is_file()]
    files = [p for p in files if p.suffix != ".so"]
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in files}
    assert statistics.median(lengths.values()) < 200
    assert not [f"{p}: {n} lines; split it by concept" for p, n in lengths.items() if n > 400]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_is_lean():
    absent = ["peft", "trl", "datasets", "rich", "bitsandbytes", "matplotlib"]
    code = (
        "import sys, torch, transformers; theirs = set(sys.modules); import nf4lora; "  # rich, with torch 2.11
        f"print(torch.cuda.is_initialized(), *(n in sys.modules.keys() - theirs for n in {absent}))"
    )
    assert run(code) == ["False"] * (1 + len(absent))


def test_public_names_are_what_they_say():
    code = (
        "import nf4lora; print(callable(nf4lora.prepare), callable(nf4lora.report), "
        "all(hasattr(nf4lora, n) for n in nf4lora.__all__), sorted(nf4lora.__all__) == nf4lora.__all__)"
    )
    assert run(code) == ["True"] * 4


def test_a_function_is_not_hidden_by_its_module():
    # `import nf4lora.prepare` anywhere would rebind the name to the module; __init__ has bound it first, and import
    # binds a submodule only once.
    code = "import nf4lora, nf4lora.prepare, nf4lora.report; print(callable(nf4lora.prepare), callable(nf4lora.report))"
    assert run(code) == ["True", "True"]


def test_import_registers_the_quantizer():
    code = (
        "import nf4lora; from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as m; "
        "print('nf4lora' in m)"
    )
    assert run(code) == ["True"]


def test_no_cpu_source_may_fuse_a_multiply_and_an_add():
    # Which processor a compiler aims at would decide on a rounding: fused products are written where they are meant.
    build = (ROOT / "CMakeLists.txt").read_text()
    targets = set(re.findall(r"(?:add_library|pybind11_add_module)\((\S+) (?:OBJECT|MODULE)", build)) - {"kernels"}
    options = {
        t for t, text in re.findall(r"target_compile_options\((\S+)([^)]*)\)", build) if "-ffp-contract=off" in text
    }
    assert targets == {"loops_${isa}", "loops_amx", "_C"} and targets <= options
