"""Every op in csrc/ops.cpp has all its parts. A new op that lacks one fails here, by name."""

from pathlib import Path

import pytest
import torch

import nf4lora
from nf4lora import _C, ops
from nf4lora.ops import reference

HERE = Path(__file__).parent
ROOT = HERE.parent
NAMES = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("nf4lora::"))


def concept(name):
    return name.removeprefix("nf4lora::").split("_")[0]


def test_catalogue_is_the_one_that_was_built():
    schemas = (ROOT / "csrc/ops.cpp").read_text()
    for name in NAMES:
        assert name.removeprefix("nf4lora::") + "(" in schemas, f"{name} is not in csrc/ops.cpp"
    assert len(NAMES) == schemas.count("m.def(")


@pytest.mark.parametrize("name", NAMES)
def test_op_is_complete(name):
    op = name.removeprefix("nf4lora::")
    plain = op.removesuffix(".out").removesuffix("_")  # in place, an op ends in _
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), f"{op}: no CPU kernel"
    # Without CUDA in the build, csrc/cuda/absent.cpp answers with the cure.
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), f"{op}: no CUDA kernel"
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel, f"{op}: no fake in ops.py"
    assert hasattr(reference, plain), f"{op}: no reference.{plain}"
    assert f"check_{plain}(" in (ROOT / f"csrc/check/{concept(name)}.h").read_text(), f"{op}: no check"
    assert (ROOT / f"csrc/cpu/{concept(name)}.cpp").exists(), f"{op}: no csrc/cpu/{concept(name)}.cpp"
    assert (HERE / f"test_{concept(name)}.py").exists(), f"{op}: no tests/test_{concept(name)}.py"
    assert (ROOT / f"bench/cases/{concept(name)}.py").exists(), f"{op}: no bench/cases/{concept(name)}.py"


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith((".out", "_backward"))])
def test_public_function_is_documented(name):
    text = getattr(ops, name.removeprefix("nf4lora::")).__doc__
    assert text
    for part in ("Raises:", ">>> "):
        assert part in text, f"{name}: its docstring has no {part!r}"


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_cuda_kernel_is_executed_and_gated(path):
    if path.stem == "launch":
        pytest.skip("launch.cu holds no kernel")
    assert (HERE / f"test_ptx_{path.stem}.py").exists(), f"{path.name}: no tests/test_ptx_{path.stem}.py"


def test_constants_come_from_one_place():
    assert nf4lora.ops.BLOCKSIZES == _C.BLOCKSIZES == tuple(2**i for i in range(5, 13))
