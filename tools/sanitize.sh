#!/usr/bin/env bash
# Builds the CPU code and the pager with AddressSanitizer and UndefinedBehaviorSanitizer, and runs their tests.
# VENV is a virtual environment made by `make test`; `tools/sanitize.sh build` only builds.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/${VENV:-.venv}/bin/python"
build=build/sanitize
tool() { "$python" -m pip --disable-pip-version-check install --quiet "cmake>=3.28" ninja pybind11; }
"$python" -c "import cmake, ninja, pybind11" 2>/dev/null || tool
cmake() { "$python" -m cmake "$@"; }

cmake -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$("$python" -c 'import ninja; print(ninja.BIN_DIR)')/ninja" \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DNF4LORA_CUDA=OFF -DNF4LORA_SANITIZE=address,undefined -DSKBUILD_PROJECT_VERSION=0.0.0 >/dev/null
cmake --build "$build" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-2}"
if [ "${1:-}" = build ]; then exit; fi

# Copy the package from the source tree, and add the instrumented module.
rm -rf "$build/site" && mkdir -p "$build/site"
cp -r python/nf4lora "$build/site/"
rm -f "$build"/site/nf4lora/_C*.so && cp "$build"/_C*.so "$build/site/nf4lora/"

# Python itself is not instrumented, so the sanitizers' runtimes are preloaded. Leaks of Python are not reported.
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
tests=(tests/test_nf4.py tests/test_absmax.py tests/test_lora.py tests/test_lora_few.py tests/test_adamw.py tests/test_optim_state.py
       tests/test_pager.py tests/test_unified.py tests/test_amx.py)
PYTHONPATH="$build/site" LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  OMP_WAIT_POLICY=passive CXXFLAGS=-fsanitize=address,undefined "$python" -m pytest -q -p no:cacheprovider \
  -n auto --maxprocesses 4 --dist loadfile --hypothesis-profile=few "${tests[@]}" \
  -k "not compile and not opcheck and not bitsandbytes"
