# make demo   fine-tune a small model on the data in examples/ and show what changed
# make test   the test suite, against the installed package
#
# Both make a virtual environment of their own in $(VENV) and need only Python, a C++ compiler and the package index.
# TORCH chooses the torch to install: make test TORCH=torch==2.13.0

PYTHON ?= python3
TORCH ?= torch>=2.11
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
SOURCES := $(shell find csrc python bench _build -type f -not -name '*.so' -not -path '*/__pycache__/*' 2>/dev/null) \
           CMakeLists.txt pyproject.toml
export CMAKE_BUILD_PARALLEL_LEVEL ?= 2

.PHONY: demo test lint format gate sanitize gpu clean

demo: $(VENV)/train
	$(RUN) examples/demo.py

test: $(VENV)/test
	$(RUN) -m pytest

lint: $(VENV)/lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/*.cu' 'tests/*.cpp')
	$(VENV)/bin/mypy

format: $(VENV)/lint
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.cu' 'tests/*.cpp')

# Registers, spills and shared memory of every CUDA kernel, against tools/ptxas_baseline.json, and the instructions of
# its machine code, where a disassembler is there or can be installed. Needs nvcc, which compiles once for both.
gate: $(VENV)/torch
	-$(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(RUN) tools/ptxas_gate.py --objects build/gate
	$(RUN) tools/sass_gate.py --objects build/gate

# The CPU tests of the ops again, with the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/test
	VENV=$(VENV) tools/sanitize.sh

# On a machine with an NVIDIA GPU: build for it, test, sanitize, measure. ARGS=--quick takes three minutes.
gpu:
	$(PYTHON) tools/gpu.py $(ARGS)

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' numpy
	touch $@

# pip builds a local project anew each time it is asked, so a changed source is never tested as it was.
$(VENV)/train: $(VENV)/torch $(SOURCES)
	$(PIP) '.[train]' gguf
	touch $@

$(VENV)/test: $(VENV)/torch $(SOURCES)
	$(PIP) '.[test]'
	touch $@

$(VENV)/lint: $(VENV)/torch
	$(PIP) ruff mypy clang-format types-PyYAML
	touch $@

clean:
	rm -rf build dist $(VENV)
