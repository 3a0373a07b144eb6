"""The launchers call the fake runtime of tests/support/ptx, whatever else is in the process: a CUDA build of torch
brings the real one, of which every function answers on a machine without a GPU that the driver is insufficient."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.ptx import cudart, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on PATH")

TESTS = Path(__file__).parent
LAUNCH = """
import ctypes, sys
from support.ptx.cudart import FETCH, FILL, LAUNCH

another, library, function = sys.argv[1:]
ctypes.CDLL(another, mode=ctypes.RTLD_GLOBAL)  # as torch loads the real one
library = ctypes.CDLL(library)
launch = LAUNCH(lambda name, grid, *_: print("launched", name.decode(), *grid.contents))
fill, fetch = FILL(lambda *_: print("filled")), FETCH(lambda *_: print("fetched"))
library.nf4lora_test_handlers(launch, fill, fetch, 80)
nf4_dequantize = getattr(library, function)
nf4_dequantize.restype = ctypes.c_char_p
codes, scales, out, stream = (ctypes.c_void_p(address) for address in (1 << 16, 1 << 17, 1 << 18, 0))
said = nf4_dequantize(codes, scales, out, 0, ctypes.c_int64(4096), ctypes.c_int64(64), stream)
print("said", said)
"""


def test_a_runtime_that_is_there_already_is_not_called(tmp_path):
    compiler = shutil.which("cc") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C compiler")
    library, names = cudart.build()
    listing = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    functions = set(re.findall(r" T (_*cuda[A-Z]\w*)$", listing, re.MULTILINE))
    assert {"__cudaRegisterFatBinary", "cudaLaunchKernel", "cudaGetLastError"} <= functions
    source, another = tmp_path / "another.c", tmp_path / "another.so"
    insufficient_driver = "{ return 35; }\n"
    text = "".join(f"int {name}(void) {insufficient_driver}" for name in functions - {"cudaGetErrorString"})
    source.write_text(text + 'const char* cudaGetErrorString(int e) { (void)e; return "the other runtime"; }\n')
    subprocess.run([compiler, "-w", "-shared", "-fPIC", source, "-o", another], check=True)

    child = [sys.executable, "-c", LAUNCH, another, library, names["nf4_dequantize"]]
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])  # bench lies there
    done = subprocess.run(child, cwd=TESTS, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    launched, said = done.stdout.splitlines()
    assert re.fullmatch(r"launched \w*nf4_dequantize\w* [1-9]\d* 1 1", launched)
    assert said == "said None"
