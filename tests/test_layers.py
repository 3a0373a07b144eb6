"""The dependency floors, of Python and of C++: a file uses only what stands below it."""

import ast
import importlib
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python/nf4lora"
CSRC = ROOT / "csrc"

# A package uses those on lower floors, and its own modules; those of one floor do not know each other.
FLOORS = [
    {"_C", "words"},
    {"compat"},
    {"memory", "ops"},
    {"nn"},
    {"adapters", "loss", "optim"},
    {"quantization"},
    {"preparation"},
    {"train"},
    {"cli", "bench"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FACES = {"__init__", "__main__"}  # the public names and `python -m nf4lora`
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in FACES)


def name_of(path):
    """ops.nf4 of python/nf4lora/ops/nf4.py, ops of its __init__."""
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


NAMES = {name_of(path) for path in MODULES}


def imports(path):
    """Modules of the package that a file names, wherever in the file the import stands, those of which only types are
    needed included; "" is the package's face."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("nf4lora."):
            module = node.module[8:]
            for alias in node.names:
                name = f"{module}.{alias.name}".lstrip(".")
                yield name if name in NAMES or name == "_C" else module
        elif isinstance(node, ast.Import):
            yield from (alias.name[8:] for alias in node.names if f"{alias.name}.".startswith("nf4lora."))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    own = name_of(path).split(".")[0]
    assert own in FLOOR, f"{own} stands on no floor: add it to FLOORS"
    for name in imports(path):
        other = name.split(".")[0]
        assert name != "ops.reference", f"{path.name} imports the reference; only tests and bench may"
        assert other, f"{path.name} imports the package's __init__"
        assert other == own or FLOOR[other] < FLOOR[own], f"{path.name} must not import {name}"


def test_the_tree_is_small():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__" and path.suffix not in (".so", ".pyi")]
    assert len(entries) <= 14
    assert len(FLOORS) <= 9  # the first is the compiled module and words


def test_no_modules_import_each_other():
    above = {name_of(path): set(imports(path)) & NAMES - {name_of(path)} for path in MODULES}
    while above:
        ground = {name for name, below in above.items() if not below & above.keys()}
        assert ground, f"in a circle: {sorted(above)}"
        above = {name: below for name, below in above.items() if name not in ground}


BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "pop", "get"}


def private_names(path):
    """Attributes and methods of others that begin with an underscore, as far as a name tells, and those that a text
    names, as getattr does: none that the file itself defines or sets."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    for node in ast.walk(tree):
        texts = []
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            texts = node.args
        elif isinstance(node, ast.Compare):
            texts = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            texts = [node.slice]
        used |= {text.value for text in texts if isinstance(text, ast.Constant)}
    used |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "_C"}
    return {name for name in used - own if isinstance(name, str) and re.match(r"_[a-z]|torch\._C", name)}


# An attribute of our own that is set through __dict__, a key in bitsandbytes' files, and one in torchtune's.
NOT_PRIVATE = {"_guard", "_load_in_4bit", "_component_"}


def test_private_names_of_others_have_one_place():
    found = {str(path.relative_to(PACKAGE)): private_names(path) for path in MODULES if path.parent.name != "compat"}
    assert {path: names - NOT_PRIVATE for path, names in found.items() if names - NOT_PRIVATE} == {}


# transformers wants these of the class of a quantizer, and torch of a module that reads its state in its own way.
INTERFACES = {"_process_model_before_weight_loading", "_process_model_after_weight_loading", "_dequantize",
              "_load_from_state_dict"}  # fmt: skip


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "compat"], ids=name_of)
def test_private_methods_of_others_are_overridden_in_one_place(path):
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.bases]
    for node in classes:
        cls = getattr(importlib.import_module(f"nf4lora.{name_of(path)}"), node.name)
        theirs = {name for base in cls.__mro__ if not base.__module__.startswith("nf4lora") for name in vars(base)}
        methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
        overridden = {name for name in methods & theirs if re.match(r"_[a-z]", name)}
        assert overridden <= INTERFACES, f"{node.name} overrides {sorted(overridden)}"


def includes(path):
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_format_knows_neither_torch_nor_cuda():
    assert includes(CSRC / "format.h") == ["cstdint"]


def test_loops_know_no_torch():
    # Nor the standard library's templates, of which the linker could keep the copy of the wrong instruction set.
    allowed = {"cstdint", "cstring", "immintrin.h", "arm_neon.h"}
    for path in (CSRC / "cpu/isa").iterdir():
        names = set(includes(path))
        assert all(n in allowed or (CSRC / "cpu/isa" / n).exists() for n in names), f"{path.name}: {names}"


def test_only_the_files_of_instruction_sets_know_one():
    build = (ROOT / "CMakeLists.txt").read_text()
    sets = re.findall(r'^    "(\w+) ', build.split("set(instruction_sets")[1].split(")")[0], re.MULTILINE)
    assert "scalar" in sets
    # Tiles are AMX's own; flushing subnormals is a mode of the processor.
    own = {path for name in sets for path in (CSRC / "cpu/isa").glob(f"{name}*.h")} | {CSRC / "cpu/isa/denormals.h"}
    for path in set((CSRC / "cpu").rglob("*.*")) - own:
        assert not re.search(r"__(AVX|SSE|ARM|aarch64)|\b_mm\d*_|immintrin|arm_neon", path.read_text()), path.name


def test_cpu_and_cuda_never_include_each_other():
    for path in (CSRC / "cpu").rglob("*.*"):
        assert not any("cuda" in name for name in includes(path)), path.name
    for path in (CSRC / "cuda").iterdir():
        assert not any(name.startswith(("cpu/", "../cpu")) for name in includes(path)), path.name


def test_kernels_know_no_torch():
    for path in [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cuh"), CSRC / "cuda/launch.h"]:
        assert not any(name.startswith(("torch", "pybind11")) for name in includes(path)), path.name


def test_a_division_that_rounds_up_has_one_place():
    written_out = re.compile(r"\+ ([\w.]+(?:<\w+>)?) - 1\) / \1(?!\w)")
    # The loops, once per instruction set, take nothing that a linker could share between them.
    elsewhere = ("ceil_div.h", "lora.cpp")
    files = [path for path in CSRC.rglob("*.*") if path.name not in elsewhere and path.parent.name != "isa"]
    found = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in files for line in path.read_text().splitlines()
             if written_out.search(line)]  # fmt: skip
    assert found == []


def test_files_stay_short():
    files = [p for p in [*PACKAGE.rglob("*.py"), *CSRC.rglob("*.*"), *(ROOT / "bench").rglob("*.py")] if p.is_file()]
    files = [p for p in files if p.suffix != ".so"]
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in files}
    assert statistics.median(lengths.values()) < 200
    assert not [f"{p}: {n} lines; split it by concept" for p, n in lengths.items() if n > 400]


# Words that name nothing: a variable is called by the noun that it holds.
NO_NAMES = {"each", "found", "held", "mine", "some", "told", "whole"}


def names_given(path):
    """Names that a file gives to variables, arguments and attributes, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield getattr(node, "id", None) or node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def test_variables_are_called_by_what_they_hold():
    files = [*MODULES, *PACKAGE.glob("__*__.py"), *(ROOT / "bench").rglob("*.py")]
    wrong = [f"{path.relative_to(ROOT)}:{line}: {name}" for path in files for name, line in names_given(path)
             if name in NO_NAMES]  # fmt: skip
    assert wrong == []


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.slow
def test_import_is_lean():
    absent = ["peft", "trl", "datasets", "rich", "bitsandbytes", "matplotlib"]
    code = (
        "import sys, torch, transformers; theirs = set(sys.modules); import nf4lora; "  # torch 2.11 imports rich
        f"print(torch.cuda.is_initialized(), *(n in sys.modules.keys() - theirs for n in {absent}))"
    )
    assert run(code) == ["False"] * (1 + len(absent))


@pytest.mark.slow
def test_public_names_are_what_they_say():
    code = (
        "import nf4lora; print(callable(nf4lora.prepare), callable(nf4lora.report), "
        "all(hasattr(nf4lora, n) for n in nf4lora.__all__), sorted(nf4lora.__all__) == nf4lora.__all__)"
    )
    assert run(code) == ["True"] * 4


@pytest.mark.slow
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
    assert targets == {"loops_${isa}", "loops_amx", "_C"}
    assert targets <= options
